import importlib.util
import json
import random
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from data_prep import fast_tokenizer
from data_prep.fast_tokenizer import PROBES, Engine, choose_engine, reference, same, vocabulary_texts
from data_prep.machine import LIBRARY
from data_prep.train_bpe import train_bpe
from mm_train.tokenizer import CONTROL_TOKENS, Tokenizer, load_tokenizer

needs_fastokens = pytest.mark.skipif(not importlib.util.find_spec("fastokens"), reason="fastokens is not installed")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Tokenizer, Path]:
    folder = tmp_path_factory.mktemp("trained")
    tokenizer = train_bpe([file.read_text(encoding="utf-8") for file in sorted(LIBRARY.glob("[a-c]*.py"))], 2000)
    tokenizer.save(folder)
    return tokenizer, folder


@pytest.fixture(scope="module")
def llama3(tmp_path_factory) -> tuple[Tokenizer, Path]:
    pytest.importorskip("llama_models", reason="the llama3 extra is not installed")
    folder = tmp_path_factory.mktemp("llama3")
    tokenizer = load_tokenizer("llama3")
    tokenizer.save(folder)
    return tokenizer, folder


def choose(tokenizer: Tokenizer, folder: Path) -> tuple[Engine, str]:
    return choose_engine(tokenizer, folder, reference(tokenizer, folder), lambda function, *given: function(*given))


@needs_fastokens
def test_fastokens_is_taken_when_it_is_exact(trained, llama3):
    for (tokenizer, folder), truth in ((trained, "tokenizers"), (llama3, "tiktoken")):
        engine, line = choose(tokenizer, folder)
        assert engine.library == "fastokens"
        assert f"equal to {truth}" in line


@needs_fastokens
def test_a_library_that_differs_anywhere_is_not_taken(trained, monkeypatch):
    tokenizer, folder = trained
    real = fast_tokenizer._fastokens
    last = vocabulary_texts(tokenizer.ordinary_tokens)[-1]

    def wrong(where: Path):
        encode = real(where)

        def encode_but_once(texts):
            ids, borders = encode(texts)
            if last in texts:
                ids = ids.copy()
                ids[-1] += 1
            return ids, borders

        return encode_but_once

    monkeypatch.setattr(fast_tokenizer, "_fastokens", wrong)
    fast_tokenizer._load.cache_clear()
    engine, line = choose(tokenizer, folder)
    assert engine.library == "tokenizers"
    assert "differs from tokenizers" in line
    monkeypatch.setattr(fast_tokenizer, "_fastokens", lambda where: 1 / 0)
    fast_tokenizer._load.cache_clear()
    assert "cannot be used: division by zero" in choose(tokenizer, folder)[1]
    fast_tokenizer._load.cache_clear()


def test_without_fastokens(trained, monkeypatch):
    monkeypatch.setattr(fast_tokenizer, "_installed", lambda name: name != "fastokens")
    engine, line = choose(*trained)
    assert engine.library == "tokenizers"
    assert "fastokens is faster" in line


def engines(folder: Path, sha256: str, *libraries: str) -> list:
    return [Engine(library, folder, sha256).load() for library in libraries]


def test_tokenizers_gives_what_tiktoken_gives(llama3):
    """Training data comes from one, prompts from the other."""
    tokenizer, folder = llama3
    probes = [*PROBES, *vocabulary_texts(tokenizer.ordinary_tokens)]
    one, other = engines(folder, tokenizer.sha256, "tokenizers", "tiktoken")
    assert same(one(probes), other(probes))


def test_control_strings_are_text_in_every_library(llama3):
    tokenizer, folder = llama3
    for encode in engines(folder, tokenizer.sha256, "fastokens", "tiktoken", "tokenizers"):
        ids, _ = encode([*CONTROL_TOKENS, "".join(CONTROL_TOKENS), "<|reserved_special_token_5|>"])
        assert ids.max() < 128000


def test_the_tokens_that_merging_cannot_reach_are_among_the_probes(llama3):
    """Those that byte-pair merging alone, as a library without `ignore_merges` does it, would cut in pieces."""
    tokenizer, folder = llama3
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["ignore_merges"] = False
    merging = tokenizers.Tokenizer.from_str(json.dumps(description))
    merging.encode_special_tokens = True
    texts = [text for text in "\n".join(vocabulary_texts(tokenizer.ordinary_tokens)).split("\n") if text]
    whole = [(text, ids[0]) for text, ids in zip(texts, tokenizer.encode_batch(texts), strict=True) if len(ids) == 1]
    merged = merging.encode_batch_fast([text for text, _ in whole], add_special_tokens=False)
    cut = {index for (_, index), item in zip(whole, merged, strict=True) if len(item.ids) > 1}
    assert len(cut) > 500
    (encode,) = engines(folder, tokenizer.sha256, "tiktoken")
    found, _ = encode(vocabulary_texts(tokenizer.ordinary_tokens))
    assert cut - set(found.tolist()) == set()


@needs_fastokens
@given(st.lists(st.text() | st.sampled_from(PROBES) | st.text("ab \n\t'1é", max_size=60), max_size=6))
def test_fastokens_equals_tokenizers_on_any_text(trained, texts):
    tokenizer, folder = trained
    fast, truth = engines(folder, tokenizer.sha256, "fastokens", "tokenizers")
    assert same(fast(texts), truth(texts))


@needs_fastokens
def test_real_text_gives_the_ids_of_tiktoken(llama3):
    tokenizer, folder = llama3
    files = sorted(LIBRARY.rglob("*.py"))
    texts = [file.read_bytes().decode(errors="replace") for file in random.Random(0).sample(files, 60)]
    fast, truth = engines(folder, tokenizer.sha256, "fastokens", "tiktoken")
    ids, borders = fast(texts)
    assert same((ids, borders), truth(texts))
    assert ids.dtype == np.uint32
    assert len(borders) == len(texts) + 1
