import dataclasses
import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from data_prep import encode as encoding
from data_prep.collect import collect
from data_prep.config import SourceConfig
from data_prep.encode import Chosen, Job, encode, find_progress
from data_prep.fast_tokenizer import Engine
from data_prep.publish import finished, join
from data_prep.render import Frame
from data_prep.sources import find_input
from mm_train.shards import ShardReader


@pytest.fixture
def make_job(byte_tokenizer, tmp_path):
    byte_tokenizer.save(tmp_path / "tokenizer")

    def make(name: str, documents: list[str], row_length: int | None = None, **values) -> Job:
        """A job for the texts, and for a conversation with each text that begins with "?"."""
        rows = [
            {"text": text}
            if not text.startswith("?")
            else {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": text[1:]}]}
            for text in documents
        ]
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = SourceConfig("files", "CC0-1.0", "code", paths=[str(file)])
        spool = tmp_path / f"{name}-spool"
        if not spool.exists():
            collect(source, find_input(name, source, 1 << 30).parts[0], None, spool)
        facts = {
            "tokenizer_sha256": byte_tokenizer.sha256,
            "vocab_size": byte_tokenizer.vocab_size,
            "licence": "CC0-1.0",
            "domain": "code",
            "layout": "packed" if row_length else "stream",
            "row_length": row_length,
            "has_mask": row_length is not None or any(text.startswith("?") for text in documents),
        }
        engine = Engine("tokenizers", tmp_path / "tokenizer", byte_tokenizer.sha256)
        job = {
            "folder": tmp_path / f"{name}-job",
            "source": "a",
            "split": "train",
            "chosen": [Chosen(spool, np.arange(len(documents)), 0)],
            "engine": engine,
            "frame": Frame.of(byte_tokenizer, engine.load()),
            "row_length": row_length,
            "shard_tokens": 1 << 25,
            "number": None,
            "facts": facts,
        }
        return Job(**{**job, **values})

    return make


def result(job: Job, out: Path) -> ShardReader:
    encode(job)
    join([job], job.folder.with_name(f"{job.folder.name}-joined"), out, {"key": "k"})
    return ShardReader(out / "a" / "train")


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_stream(make_job, byte_tokenizer, tmp_path):
    reader = result(make_job("s", ["one", "?two", "x" * 300]), tmp_path / "out")
    texts = [byte_tokenizer.decode(tokens, skip_special=False) for tokens, _ in reader.documents()]
    assert texts[0] == "<|begin_of_text|>one<|end_of_text|>"
    assert texts[1].endswith("two<|eot|>")
    assert texts[2] == f"<|begin_of_text|>{'x' * 300}<|end_of_text|>"
    assert (reader.manifest.num_documents, reader.manifest.num_bytes) == (3, 307)
    for (tokens, mask), trained in zip(
        reader.documents(), ["one<|end_of_text|>", "two<|eot|>", f"{'x' * 300}<|end_of_text|>"], strict=True
    ):
        assert byte_tokenizer.decode(tokens[mask], skip_special=False) == trained
    assert not result(make_job("texts", ["one", "two"]), tmp_path / "texts").manifest.has_mask


def test_documents_keep_their_order_over_batches_and_shards(make_job, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "BATCH_BYTES", 200)
    texts = [f"document {i} é" * (i % 5 + 1) for i in range(100)]
    job = make_job("s", texts, shard_tokens=500)
    reader = result(job, tmp_path / "out")
    assert [byte_tokenizer.decode(tokens) for tokens, _ in reader.documents()] == texts
    assert len(reader.manifest.shards) == finished(job).shards > 5
    assert all(shard.num_tokens >= 500 for shard in reader.manifest.shards[:-1])
    reader.verify()


def test_packed_keeps_every_token_of_what_fits_and_counts_the_rest(make_job, byte_tokenizer, tmp_path):
    documents = ["?" + "a" * n for n in (3, 90, 10, 1, 40)] + ["plain " * 30, "short"]
    job = make_job("p", documents, row_length=65)
    reader = result(job, tmp_path / "out")
    progress = finished(job)
    assert (progress.cut, progress.dropped) == (1, [1, 91])
    assert reader.manifest.num_bytes == 1 * 4 + 3 + 10 + 1 + 40 + 180 + 5

    found = [
        (tokens.tolist(), mask.tolist()) for tokens, mask in reader.documents() if tokens[0] != byte_tokenizer.pad_id
    ]
    expected = [
        byte_tokenizer.render_chat([{"role": "user", "content": "?"}, {"role": "assistant", "content": "a" * n}])
        for n in (3, 10, 1, 40)
    ]
    for ids, mask in expected:
        assert (ids, mask) in found
    text_tokens = [token for ids, mask in found if (ids, mask) not in expected for token in ids]
    assert byte_tokenizer.decode(text_tokens).count("plain ") + byte_tokenizer.decode(text_tokens).count("short") >= 30
    for row in range(reader.num_windows(64)):
        tokens, mask, starts = reader.window(row, 64)
        assert starts[0]
        assert not mask[tokens == byte_tokenizer.pad_id].any()
    assert reader.manifest.num_padding == sum(
        int(np.sum(reader.window(row, 64)[0] == byte_tokenizer.pad_id)) for row in range(reader.num_windows(64))
    )


def test_groups_bound_what_is_packed_together(make_job, tmp_path, monkeypatch):
    monkeypatch.setattr(encoding, "GROUP_DOCUMENTS", 2)
    assert result(make_job("g", ["a" * 8] * 5, row_length=40), tmp_path / "out").num_tokens == 3 * 40


@pytest.mark.parametrize("row_length", [None, 40])
def test_from_any_shard_on_the_rest_comes_out_the_same(make_job, tmp_path, monkeypatch, row_length):
    monkeypatch.setattr(encoding, "GROUP_DOCUMENTS", 16)
    monkeypatch.setattr(encoding, "BATCH_BYTES", 100)
    texts = [("?" if i % 3 else "") + "word " * (i * 7 % 11) + str(i) for i in range(60)]
    job = make_job("whole", texts, row_length=row_length, shard_tokens=200)
    encode(job)
    whole = content(job.folder)
    count = finished(job).shards
    assert count > 5
    for done in range(count):
        again = dataclasses.replace(job, folder=tmp_path / f"again-{done}")
        shutil.copytree(job.folder, again.folder)
        (again.folder / "done.json").unlink()
        for shard in range(done, count):
            shutil.rmtree(again.folder / f"{shard:05d}")
        if done:
            half = again.folder / f"{done:05d}" / "a" / "train"
            half.mkdir(parents=True)
            (half / "00000.tar.tmp").write_bytes(b"half a shard")
        before = {file: file.stat().st_mtime_ns for file in again.folder.rglob("*.tar")}
        assert find_progress(again).shards == done
        encode(again)
        assert content(again.folder) == whole
        assert all(file.stat().st_mtime_ns == time for file, time in before.items())


def test_publishing_can_be_cut_short_anywhere(make_job, tmp_path, monkeypatch):
    jobs = [make_job(f"j{i}", ["some text here " * 9] * 5, shard_tokens=200, number=i) for i in range(2)]
    for job in jobs:
        encode(job)
    shutil.copytree(tmp_path, tmp_path.with_name(f"{tmp_path.name}-copy"))
    join(jobs, tmp_path / "joined", tmp_path / "out", {"key": "k"})
    whole = content(tmp_path / "out")
    names = {name.split("/")[-1] for name in whole}
    assert names == {"manifest.json", *(f"{i:05d}.tar" for i in range(len(names) - 1))}

    class Cut(Exception):
        pass

    real, calls, limit = os.replace, 0, 0

    def cut(source, target):
        nonlocal calls
        calls += 1
        if calls > limit:
            raise Cut
        real(source, target)

    monkeypatch.setattr(os, "replace", cut)
    for limit in range(3, 12):  # read by `cut`; the last three of an attempt go together
        copy = tmp_path / f"copy-{limit}"
        shutil.copytree(tmp_path.with_name(f"{tmp_path.name}-copy"), copy)
        moved = [dataclasses.replace(job, folder=copy / job.folder.name) for job in jobs]
        for _ in range(20):
            calls = 0
            try:
                join(moved, copy / "joined", copy / "out", {"key": "k"})
                break
            except Cut:
                continue
        assert content(copy / "out") == whole
