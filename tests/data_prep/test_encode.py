import json
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from data_prep import encode
from data_prep.encode import TokenizerFile, encode_spool, write_packed, write_stream
from mm_train.shards import ShardReader, ShardWriter


@pytest.fixture
def tokenizer_file(byte_tokenizer, tmp_path) -> TokenizerFile:
    byte_tokenizer.save(tmp_path / "tokenizer")
    return TokenizerFile(tmp_path / "tokenizer", byte_tokenizer.sha256)


@pytest.fixture
def pool():
    with ThreadPoolExecutor(2) as pool:
        yield pool


def spool(file: Path, documents: list) -> Path:
    rows = [
        {"text": item, "messages": []} if isinstance(item, str) else {"text": "", "messages": item}
        for item in documents
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def chat(answer: str) -> list[dict]:
    return [{"role": "user", "content": "?"}, {"role": "assistant", "content": answer}]


def writer(folder: Path, tokenizer, **values) -> ShardWriter:
    facts = {"tokenizer_sha256": tokenizer.sha256, "vocab_size": tokenizer.vocab_size, "licence": "x", "domain": "x"}
    return ShardWriter(folder, "a", "train", **facts, **values)


def test_processes_give_the_documents_in_order(tmp_path, tokenizer_file, byte_tokenizer, monkeypatch):
    monkeypatch.setattr(encode, "CHUNK_BYTES", 200)
    monkeypatch.setattr(encode, "AHEAD", 2)
    texts = [f"document {i} é" * (i % 5 + 1) for i in range(100)]
    file = spool(tmp_path / "a.jsonl", texts)
    done = []
    with ProcessPoolExecutor(2, get_context("spawn")) as pool:
        found = list(encode_spool(file, tokenizer_file, None, pool, done.append))
    assert [byte_tokenizer.decode(item.pieces[0][0]) for item in found] == texts
    assert [item.num_bytes for item in found] == [len(text.encode()) for text in texts]
    assert sum(done) == file.stat().st_size
    assert len(done) > 10


def test_stream(tmp_path, tokenizer_file, byte_tokenizer, pool):
    file = spool(tmp_path / "a.jsonl", ["one", chat("two"), "x" * 300])
    out = writer(tmp_path, byte_tokenizer)
    write_stream(encode_spool(file, tokenizer_file, None, pool, lambda size: None), out)
    manifest = out.close()
    texts = [byte_tokenizer.decode(tokens, skip_special=False) for tokens, _ in ShardReader(out.folder).documents()]
    assert texts[0] == "<|begin_of_text|>one<|end_of_text|>"
    assert texts[1].endswith("two<|eot|>")
    assert texts[2] == f"<|begin_of_text|>{'x' * 300}<|end_of_text|>"
    assert (manifest.num_documents, manifest.num_bytes) == (3, 307)


def test_packed_keeps_every_token_of_what_fits_and_counts_the_rest(tmp_path, tokenizer_file, byte_tokenizer, pool):
    documents = [chat("a" * n) for n in (3, 90, 10, 1, 40)] + ["plain " * 30, "short"]
    file = spool(tmp_path / "a.jsonl", documents)
    out = writer(tmp_path, byte_tokenizer, layout="packed", row_length=65, has_mask=True)
    fit = write_packed(encode_spool(file, tokenizer_file, 65, pool, lambda size: None), out, 65, byte_tokenizer.pad_id)
    manifest = out.close()
    assert (fit.cut, fit.dropped) == (1, [1, 91])
    assert manifest.num_bytes == 1 * 4 + 3 + 10 + 1 + 40 + 180 + 5

    reader = ShardReader(out.folder)
    found = [
        (tokens.tolist(), mask.tolist()) for tokens, mask in reader.documents() if tokens[0] != byte_tokenizer.pad_id
    ]
    expected = [byte_tokenizer.render_chat(chat("a" * n)) for n in (3, 10, 1, 40)]
    for ids, mask in expected:
        assert (ids, mask) in found
    text_tokens = [token for ids, _ in found if (ids, _) not in expected for token in ids]
    assert byte_tokenizer.decode(text_tokens).count("plain ") + byte_tokenizer.decode(text_tokens).count("short") >= 30
    for row in range(reader.num_windows(64)):
        tokens, mask, starts = reader.window(row, 64)
        assert starts[0]
        assert not mask[tokens == byte_tokenizer.pad_id].any()
    assert manifest.num_padding == sum(
        int(np.sum(reader.window(row, 64)[0] == byte_tokenizer.pad_id)) for row in range(reader.num_windows(64))
    )


def test_groups_bound_what_is_packed_together(tmp_path, tokenizer_file, byte_tokenizer, pool, monkeypatch):
    monkeypatch.setattr(encode, "PACK_GROUP", 2)
    file = spool(tmp_path / "a.jsonl", ["a" * 8] * 5)
    out = writer(tmp_path, byte_tokenizer, layout="packed", row_length=40, has_mask=True)
    write_packed(encode_spool(file, tokenizer_file, 40, pool, lambda size: None), out, 40, byte_tokenizer.pad_id)
    assert out.close().num_tokens == 3 * 40
