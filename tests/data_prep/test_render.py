from data_prep.render import render
from data_prep.sources import Document


def test_a_text_is_framed_and_trained_on_from_its_second_token(byte_tokenizer):
    ((ids, mask),) = render(Document("ab"), byte_tokenizer)
    assert byte_tokenizer.decode(ids, skip_special=False) == "<|begin_of_text|>ab<|end_of_text|>"
    assert mask == [False, True, True, True]


def test_a_long_text_is_cut_into_rows_and_nothing_is_lost(byte_tokenizer):
    (whole,) = render(Document("abcdefgh"), byte_tokenizer)
    pieces = render(Document("abcdefgh"), byte_tokenizer, row_length=4)
    assert [len(ids) for ids, _ in pieces] == [4, 4, 2]
    assert [i for ids, _ in pieces for i in ids] == whole[0]
    assert [keep for _, mask in pieces for keep in mask] == whole[1]


def test_a_conversation_is_rendered_by_the_chat_format_and_never_cut(byte_tokenizer):
    messages = ({"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."})
    ((ids, mask),) = render(Document(messages=messages), byte_tokenizer, row_length=4)
    assert (ids, mask) == byte_tokenizer.render_chat(messages)
