import numpy as np
import pytest

from data_prep.documents import Document
from data_prep.fast_tokenizer import Engine
from data_prep.render import Frame, render


@pytest.fixture
def rendered(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path)
    encode = Engine("tokenizers", tmp_path, byte_tokenizer.sha256).load()

    def one(document: Document, row_length: int | None = None) -> list:
        (pieces,) = render([document], Frame.of(byte_tokenizer, encode), encode, row_length)
        return [(ids.tolist(), None if mask is None else mask.tolist()) for ids, mask in pieces]

    one.many = lambda documents: render(documents, Frame.of(byte_tokenizer, encode), encode, 8)
    return one


def test_a_text_is_framed_and_trained_on_from_its_second_token(byte_tokenizer, rendered):
    ((ids, mask),) = rendered(Document("ab"), 100)
    assert byte_tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>ab<|end_of_text|>"
    assert mask == [False, True, True, True]
    assert rendered(Document("ab")) == [(ids, None)]


def test_a_long_text_is_cut_into_rows_and_nothing_is_lost(rendered):
    (whole,) = rendered(Document("abcdefgh"), 100)
    pieces = rendered(Document("abcdefgh"), 4)
    assert [len(ids) for ids, _ in pieces] == [4, 4, 2]
    assert [i for ids, _ in pieces for i in ids] == whole[0]
    assert [keep for _, mask in pieces for keep in mask] == whole[1]


def test_a_conversation_is_rendered_by_the_chat_format_and_never_cut(byte_tokenizer, rendered):
    messages = tuple(
        {"role": role, "content": content}
        for role, content in [
            ("system", "Be brief."),
            ("user", "Why?"),
            ("assistant", "Because. <|eot|>"),
            ("tool", ""),
            ("assistant", ""),
            ("user", "é"),
            ("assistant", "✓"),
        ]
    )
    assert rendered(Document(messages=messages), 4) == [byte_tokenizer.render_chat(messages)]


def test_documents_of_a_batch_do_not_mix(byte_tokenizer, rendered):
    chat = Document(messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}))
    documents = [Document("one"), chat, Document(""), chat, Document("last one")]
    together = rendered.many(documents)
    for document, pieces in zip(documents, together, strict=True):
        for (ids, mask), (alone, alone_mask) in zip(pieces, rendered(document, 8), strict=True):
            assert (ids.tolist(), mask.tolist()) == (alone, alone_mask)
            assert ids.dtype == np.uint32
