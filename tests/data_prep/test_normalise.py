from hypothesis import given
from hypothesis import strategies as st

from data_prep.config import NORMALISE
from data_prep.documents import Document
from data_prep.normalise import normalise

TEXT = "\ufeffa\r\nb\rc\x00\x08 \t\ncafe\u0301\f\n\n"


def test_each_repair():
    def repaired(*steps: str) -> str:
        return normalise(Document(TEXT), steps).text

    assert repaired() == TEXT
    assert repaired("newlines") == "\ufeffa\nb\nc\x00\x08 \t\ncafe\u0301\f\n\n"
    assert repaired("control") == "a\r\nb\rc \t\ncafe\u0301\f\n\n"
    assert repaired("nfc") == TEXT.replace("e\u0301", "é")
    assert repaired("newlines", "control", "trim") == "a\nb\nc\ncafe\u0301\f"


def test_messages_are_repaired_one_by_one():
    chat = Document(messages=({"role": "user", "content": "a\r"}, {"role": "assistant", "content": "b\r\n"}))
    assert [m["content"] for m in normalise(chat, ["newlines"]).messages] == ["a\n", "b\n"]


@given(st.text())
def test_a_repaired_text_stays_as_it_is(text):
    once = normalise(Document(text), NORMALISE)
    assert normalise(once, NORMALISE) == once
