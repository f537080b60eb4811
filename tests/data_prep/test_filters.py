import pytest

from data_prep.config import FILTERS
from data_prep.documents import Document
from data_prep.filters import CLASSES, load_filters
from mm_train.cli import UserError

pytest.importorskip("datatrove", reason="the quality extra is not installed")
pytest.importorskip("spacy", reason="the quality extra is not installed")

PROSE = (
    "The river was low that summer, and the children of the village walked across it to the far bank. "
    "They had been told that the old mill was dangerous, but that did not keep them away. "
    "On most days they sat in its shade and ate the bread that they had brought with them. "
    "In the evening they went home by the bridge, so that nobody would see their wet shoes. "
    "When the rain came at last, the stones were covered again and the mill was left to the birds. "
)


def test_every_filter_of_the_config_is_there():
    assert {*CLASSES, "language"} == set(FILTERS)


def test_good_text_is_kept_and_bad_text_dropped_with_a_reason():
    for name in ("gopher_quality", "c4_quality", "fineweb_quality"):
        (apply,) = load_filters({name: {}})
        assert apply(Document(PROSE.replace(". ", ".\n"))) == (Document(PROSE.replace(". ", ".\n").strip()), "") or (
            apply(Document(PROSE.replace(". ", ".\n")))[1] == ""
        )
        assert apply(Document("buy now !!! " * 3))[1].startswith(f"{name}: ")
    (repetition,) = load_filters({"gopher_repetition": None})
    assert repetition(Document(PROSE))[1] == ""
    assert repetition(Document("the same line\n" * 50))[1] == "gopher_repetition: dup_line_frac"


def test_options_reach_the_filter():
    (strict,) = load_filters({"gopher_quality": {"min_doc_words": 1000}})
    assert strict(Document(PROSE))[1] == "gopher_quality: gopher_short_doc"
    with pytest.raises(UserError, match=r"filter gopher_quality: .*min_words"):
        load_filters({"gopher_quality": {"min_words": 1}})


def test_lines_are_taken_out_of_texts_but_not_out_of_answers():
    text = PROSE.replace(". ", ".\n") + "\nEnable javascript to read this.\n"
    (apply,) = load_filters({"c4_quality": {}})
    kept, reason = apply(Document(text))
    assert reason == ""
    assert "javascript" not in kept.text
    chat = Document(messages=({"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text}))
    assert apply(chat) == (chat, "")
