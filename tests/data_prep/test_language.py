"""English is the documentation that Python carries."""

import inspect
import json
import pydoc_data.topics as topics

import pytest
import yaml

from data_prep import run
from data_prep.documents import Document
from data_prep.filters import load_filters
from mm_train.cli import UserError

pytest.importorskip("py3langid", reason="the quality extra is not installed")

GERMAN = [  # articles of the Universal Declaration of Human Rights, of the United Nations
    "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und "
    "sollen einander im Geist der Brüderlichkeit begegnen.",
    "Jeder hat das Recht auf Leben, Freiheit und Sicherheit der Person. Niemand darf in Sklaverei oder Leibeigenschaft "
    "gehalten werden; Sklaverei und Sklavenhandel sind in allen ihren Formen verboten.",
    "Jeder hat das Recht, überall als rechtsfähig anerkannt zu werden. Alle Menschen sind vor dem Gesetz gleich und "
    "haben ohne Unterschied Anspruch auf gleichen Schutz durch das Gesetz.",
]
ENGLISH = [text for text in topics.topics.values() if len(text) > 2000]


def reasons(texts: list[str], **options) -> list[str]:
    (apply,) = load_filters({"language": options})
    return [apply(Document(text))[1] for text in texts]


def test_two_languages_are_told_apart():
    assert len(ENGLISH) > 30
    assert reasons(ENGLISH, keep=["en"]).count("") >= 0.97 * len(ENGLISH)
    assert reasons(GERMAN, keep=["en"]) == ["language: de"] * 3
    assert reasons([*GERMAN, ENGLISH[0]], keep=["de", "en"]) == [""] * 4
    assert set(reasons(GERMAN, keep=["de"], min_probability=1.0)) <= {"language: unclear", ""}
    (apply,) = load_filters({"language": {"keep": ["de"]}})
    chat = Document(messages=({"role": "user", "content": GERMAN[0]}, {"role": "assistant", "content": GERMAN[1]}))
    assert apply(chat) == (chat, "")


@pytest.mark.parametrize("options", [{}, {"keep": "en"}, {"keep": ["english"]}, {"keep": ["en"], "min_probability": 2}])
def test_options_that_make_no_sense(options):
    with pytest.raises(UserError, match="filter language: "):
        load_filters({"language": options})


def test_an_unknown_option():
    with pytest.raises(UserError, match=r"filter language: .*languages"):
        load_filters({"language": {"languages": ["en"]}})


def test_in_a_preparation(tmp_path):
    texts = [*ENGLISH[:20], *GERMAN, inspect.getsource(json)]
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    source = {"kind": "files", "paths": [f"{tmp_path}/text.jsonl"], "licence": "PSF-2.0", "domain": "web"}
    source["filters"] = {"language": {"keep": ["en"]}}
    tokenizer = {"kind": "train_bpe", "vocab_size": 600}
    config = {"out": str(tmp_path / "out"), "tokenizer": tokenizer, "sources": {"text": source}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config))
    assert run.main([str(tmp_path / "config.yaml"), "--workers", "1"]) == 0
    dropped = json.loads((tmp_path / "out" / "dataset.json").read_text())["sources"]["text"]["dropped"]
    assert dropped["language: de"]["documents"] == 3
