import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.machine import LIBRARY
from data_prep.train_bpe import train_bpe
from mm_train.cli import UserError
from mm_train.tokenizer import CONTROL_TOKENS


@pytest.fixture(scope="module")
def texts() -> list[str]:
    return [file.read_text(encoding="utf-8") for file in sorted(LIBRARY.glob("[a-b]*.py"))]


@pytest.fixture(scope="module")
def trained(texts):
    return train_bpe(texts, 1024)


def test_size_and_usefulness(trained, texts):
    assert trained.vocab_size == 1024
    assert trained.bos_id == 1024 - len(CONTROL_TOKENS)
    ids = trained.encode(texts[0])
    assert len(ids) < len(texts[0].encode()) / 2
    assert trained.decode(ids) == texts[0]


def test_two_runs_give_the_same_bytes(trained, texts):
    assert train_bpe(iter(texts), 1024).sha256 == trained.sha256


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.text(), st.sampled_from([*CONTROL_TOKENS, "def ", "    ", "\n\n"]))).map("".join))
def test_round_trip(trained, text):
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert max(ids, default=0) < trained.bos_id
    assert int(trained.token_bytes()[ids].sum()) == len(text.encode())


def test_control_strings_in_the_training_text_are_learnt_as_text():
    trained = train_bpe(["<|eot|> <|begin_of_text|> " * 50 + "".join(map(chr, range(32, 400))) * 9], 512)
    ids = trained.encode("<|eot|><|begin_of_text|>")
    assert max(ids) < trained.bos_id
    assert trained.decode(ids) == "<|eot|><|begin_of_text|>"


def test_too_little_text():
    with pytest.raises(UserError, match=r"too little to learn 4096 tokens from \(it gave 283\)"):
        train_bpe(["a few words"], 4096)
