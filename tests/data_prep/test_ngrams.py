import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_prep import ngrams
from data_prep.ngrams import Index, find_words, search


def slow_words(text: str) -> list[str]:
    return re.findall(r"[0-9a-z]+", text.lower())


def make_index(texts: list[str], length: int) -> Index:
    words = find_words(texts)
    hashes, first = words.runs(length)
    unique, places = np.unique(hashes, return_index=True)
    return Index(length, unique, words.texts[first[places]].astype(np.uint32))


WORDS = st.lists(st.sampled_from(["a", "b", "ab", "ba", "aa"]), max_size=12).map(" ".join)


@given(st.lists(WORDS, min_size=1, max_size=5), st.lists(WORDS, min_size=1, max_size=5), st.integers(1, 4))
def test_a_run_is_found_exactly_where_it_is(indexed, texts, length):
    known = {tuple(words[i : i + length]) for words in map(slow_words, indexed) for i in range(len(words) - length + 1)}
    expected = set()
    for number, text in enumerate(texts):
        words = slow_words(text)
        if any(tuple(words[i : i + length]) in known for i in range(len(words) - length + 1)):
            expected.add(number)
    hits = search([make_index(indexed, length)], texts)
    assert set(hits) == expected
    for number, hit in hits.items():
        assert tuple(hit.words.split()) in known
        assert hit.words in " ".join(slow_words(texts[number]))
        assert hit.words in " ".join(slow_words(indexed[hit.owner]))


@given(st.text())
def test_words_of_any_text_are_found_again(text):
    words = find_words([text, "one two"])
    assert (np.diff(words.begins) > 0).all()
    assert words.texts.tolist()[-2:] == [1, 1]
    found = [words.data[a:b].decode() for a, b in zip(words.begins, words.ends, strict=True)]
    assert len(set(words.hashes.tolist())) == len(set(found))
    assert all(word == word.lower() for word in found if word.isascii())


@pytest.mark.parametrize(
    "text",
    [
        "THE QUICK BROWN FOX; JUMPS OVER!",
        "the\nquick\n  brown\tfox -- jumps, over.",
        "“the” quick ‘brown’ — fox… jumps\u00a0over",
        "**the** _quick_ `brown` (fox) [jumps] {over}",
        "x" * 50 + " the quick brown fox jumps over " + "y" * 50,
    ],
)
def test_case_space_and_punctuation_make_no_difference(text):
    assert search([make_index(["The quick brown fox jumps over"], 6)], ["nothing here", text]).keys() == {1}


def test_long_texts_are_searched_everywhere(monkeypatch):
    monkeypatch.setattr(ngrams, "BATCH_BYTES", 1000)
    monkeypatch.setattr(ngrams, "OVERLAP", 100)
    index = make_index(["one two three four five six seven eight"], 8)
    filler = "other words " * 400
    for at in range(0, len(filler), 97):
        text = f"{filler[:at]} one two three four five six seven eight {filler[at:]}"
        assert search([index], ["short", text, "last"]).keys() == {1}
