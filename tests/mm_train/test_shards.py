import dataclasses
import json
import resource
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train import shards
from mm_train.cli import UserError
from mm_train.shards import ShardReader, ShardWriter, read_manifest, write_manifest
from tests.mm_train import shards_format_1

VOCAB = 1000
PAD = 999


def make_writer(folder: Path, **changes) -> ShardWriter:
    facts = {"tokenizer_sha256": "a" * 64, "vocab_size": VOCAB, "licence": "CC0-1.0", "domain": "test"}
    return ShardWriter(folder, changes.pop("source", "code"), "train", **{**facts, **changes})


def write(folder: Path, documents, masks=None, **changes) -> Path:
    writer = make_writer(folder, has_mask=masks is not None, **changes)
    for i, document in enumerate(documents):
        writer.add(document, None if masks is None else masks[i], num_bytes=len(document))
    writer.close()
    return writer.folder


documents_strategy = st.lists(st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30), min_size=1, max_size=25)


@settings(max_examples=60, deadline=None)
@given(documents_strategy, st.integers(1, 60), st.integers(1, 40), st.booleans(), st.sampled_from([8, 16, 1 << 16]))
def test_windows_equal_a_plain_concatenation(tmp_path_factory, documents, shard_tokens, seq_len, has_mask, block_bytes):
    masks = [[token % 2 == 0 for token in document] for document in documents] if has_mask else None
    sizes = {"shard_tokens": shard_tokens, "block_bytes": block_bytes}
    folder = write(tmp_path_factory.mktemp("shards"), documents, masks, **sizes)
    tokens = np.array([token for document in documents for token in document])
    starts = np.array([i == 0 for document in documents for i in range(len(document))])
    trained = tokens % 2 == 0 if has_mask else np.ones(len(tokens), dtype=bool)

    reader = ShardReader(folder)
    assert reader.num_tokens == len(tokens)
    assert reader.num_windows(seq_len) == (len(tokens) - 1) // seq_len
    for i in range(reader.num_windows(seq_len)):
        span = slice(i * seq_len, i * seq_len + seq_len + 1)
        got = reader.window(i, seq_len)
        assert [part.dtype for part in got] == [np.uint32, np.bool_, np.bool_]
        for found, expected in zip(got, (tokens, trained, starts), strict=True):
            np.testing.assert_array_equal(found, expected[span])
        row = reader.row(i, seq_len)
        np.testing.assert_array_equal(row.starts, np.flatnonzero(starts[span]))
        assert (row.mask is None) is not has_mask
    assert [document.tolist() for document, _ in reader.documents()] == documents
    reader.verify()


def test_packed_rows(tmp_path):
    writer = make_writer(tmp_path, layout="packed", row_length=8, has_mask=True, shard_tokens=16)
    rows = [[[1, 2, 3], [4, 5]], [[6] * 8], [[7, 8]]]
    for row in rows:
        for document in row:
            writer.add(document, [token != 2 for token in document], num_bytes=1)
        writer.end_row(PAD)
    manifest = writer.close()
    assert (manifest.num_tokens, manifest.num_padding, manifest.num_documents) == (24, 9, 4)
    assert [shard.num_tokens for shard in manifest.shards] == [16, 8]

    reader = ShardReader(writer.folder)
    assert reader.num_windows(7) == 3
    tokens, mask, starts = reader.window(0, 7)
    assert tokens.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert mask.tolist() == [True, False, True, True, True, False, False, False]
    assert np.flatnonzero(starts).tolist() == [0, 3, 5]
    assert reader.window(2, 7)[0].tolist() == [7, 8] + [PAD] * 6
    with pytest.raises(UserError, match=r"rows of 8 tokens.* sequence length of 7, not 16"):
        reader.num_windows(16)


def test_writer_refuses_what_could_not_be_read_back(tmp_path):
    writer = make_writer(tmp_path, layout="packed", row_length=4, has_mask=True)
    writer.add([1, 2, 3], [1, 1, 1])
    with pytest.raises(ValueError, match="crosses the row"):
        writer.add([4, 5], [1, 1])
    with pytest.raises(ValueError, match="vocabulary"):
        writer.add([VOCAB], [1])
    with pytest.raises(ValueError, match="vocabulary"):
        writer.add([], [])
    with pytest.raises(ValueError, match="mask"):
        writer.add([1], None)


def test_shards_are_webdataset_shards(tmp_path):
    folder = write(tmp_path, [[1, 2], [3]], [[1, 0], [1]])
    (sample,) = webdataset.WebDataset(str(folder / "00000.tar"), shardshuffle=False)
    assert sample["__key__"] == "code-train-00000"
    assert np.frombuffer(sample["tokens"], "<u4").tolist() == [1, 2, 3]
    assert np.frombuffer(sample["offsets"], "<u8").tolist() == [0, 2, 3]
    assert np.frombuffer(sample["mask"], "u1").tolist() == [1, 0, 1]
    assert json.loads(sample["json"])["num_documents"] == 2


def test_a_shard_that_joins_others_has_members_of_its_own_name(tmp_path):
    """Two parts become one source: their shards renamed, their manifests put together."""
    parts = [write(tmp_path / number, [[i, i]], number=number) for i, number in enumerate(("00000", "00001"))]
    (tmp_path / "whole").mkdir()
    shards = []
    for i, part in enumerate(parts):
        (part / "00000.tar").rename(tmp_path / "whole" / f"{i:05d}.tar")
        shards.append(read_manifest(part).shards[0]._replace(file=f"{i:05d}.tar"))
    whole = dataclasses.replace(read_manifest(parts[0]), shards=shards, num_tokens=4, num_documents=2)
    assert write_manifest(tmp_path / "whole", whole).num_tokens == 4
    reader = ShardReader(tmp_path / "whole")
    assert [tokens.tolist() for tokens, _ in reader.documents()] == [[0, 0], [1, 1]]
    urls = [str(tmp_path / "whole" / shard.file) for shard in shards]
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == ["code-train-00000", "code-train-00001"]


@pytest.mark.parametrize("num_tokens", range(1, 3000, 119))
def test_every_size_of_tar_ends_as_tars_do(tmp_path, num_tokens):
    folder = write(tmp_path, [[1] * num_tokens])
    data = (folder / "00000.tar").read_bytes()
    assert len(data) % tarfile.RECORDSIZE == 0
    assert not any(data[-2 * tarfile.BLOCKSIZE :])
    with tarfile.open(folder / "00000.tar") as tar:
        assert len(tar.getmembers()) == 4


def test_members_lie_where_the_manifest_says(tmp_path):
    folder = write(tmp_path, [[1, 2], [3]])
    (shard,) = ShardReader(folder).manifest.shards
    with tarfile.open(folder / "00000.tar") as tar:
        for name, member in shard.members.items():
            info = tar.getmember(f"code-train-00000.{name}")
            assert (info.offset_data, info.size) == (member.offset, member.size)


def test_two_runs_are_byte_identical_and_replace_each_other(tmp_path):
    first = write(tmp_path / "a", [[1, 2]] * 9, shard_tokens=4)
    again = write(tmp_path / "b", [[3]] * 90, shard_tokens=4)
    assert len(list(again.glob("*.tar"))) > len(list(first.glob("*.tar")))
    again = write(tmp_path / "b", [[1, 2]] * 9, shard_tokens=4)
    assert {file.name: file.read_bytes() for file in first.iterdir()} == {
        file.name: file.read_bytes() for file in again.iterdir()
    }


def test_unfinished_work_is_not_a_data_set(tmp_path):
    folder = write(tmp_path, [[1, 2]])
    make_writer(tmp_path).add([3])  # an interrupted second preparation
    with pytest.raises(UserError, match=r"manifest\.json is missing"):
        ShardReader(folder)


def test_a_full_disk_leaves_nothing_that_could_be_read(tmp_path):
    writer = make_writer(tmp_path)
    writer.add([1] * 10_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(writer.folder.glob("*.tar"))
    with pytest.raises(UserError, match="no shards in"):
        ShardReader(writer.folder)
    assert ShardReader(write(tmp_path, [[1, 2]])).num_tokens == 2  # and the place can be used again
    assert sorted(file.name for file in writer.folder.iterdir()) == ["00000.tar", "manifest.json"]


def test_missing_truncated_and_grown_shards(tmp_path):
    folder = write(tmp_path, [[1, 2]] * 9, shard_tokens=4)
    shard = folder / "00002.tar"
    data = shard.read_bytes()
    shard.write_bytes(data[:-512])
    with pytest.raises(
        UserError, match=rf"truncated shard .*00002\.tar: {len(data) - 512} bytes found, {len(data)} ex"
    ):
        ShardReader(folder)
    shard.write_bytes(data + b"x")
    with pytest.raises(UserError, match="overlong shard"):
        ShardReader(folder)
    shard.unlink()
    with pytest.raises(UserError, match=r"missing shard .*00002\.tar"):
        ShardReader(folder)


@pytest.mark.parametrize("name", ["tokens", "mask", "offsets"])
def test_a_flipped_byte_is_found_when_its_block_is_read(tmp_path, name):
    documents = [[i] * 8 for i in range(40)]
    folder = write(tmp_path, documents, documents, block_bytes=64)
    member = ShardReader(folder).manifest.shards[0].members[name]
    data = bytearray((folder / "00000.tar").read_bytes())
    data[member.offset + member.size - (9 if name == "offsets" else 1)] ^= 1  # the end is no start of a document
    (folder / "00000.tar").write_bytes(data)
    reader = ShardReader(folder)
    reader.window(0, 8)
    with pytest.raises(UserError, match=rf"corrupt block in shard .*00000\.tar: the {name} at byte \d+"):
        reader.window(reader.num_windows(8) - 1, 8)
    with pytest.raises(UserError, match="corrupt shard"):
        reader.verify()
    unchecked = ShardReader(folder, checked=False)
    unchecked.window(unchecked.num_windows(8) - 1, 8)


def test_a_flipped_byte_of_the_index(tmp_path):
    folder = write(tmp_path, [[1, 2]])
    member = ShardReader(folder).manifest.shards[0].members["index"]
    data = bytearray((folder / "00000.tar").read_bytes())
    data[member.offset] ^= 1
    (folder / "00000.tar").write_bytes(data)
    with pytest.raises(UserError, match=r"corrupt index in shard .*00000\.tar"):
        ShardReader(folder).window(0, 1)


def test_folders_of_the_first_format_are_read(tmp_path):
    reader = ShardReader(shards_format_1.write(tmp_path / "train"))
    assert (reader.manifest.num_tokens, reader.manifest.num_padding, reader.manifest.num_documents) == (24, 9, 4)
    reader.verify()
    tokens, mask, starts = reader.window(0, 7)
    assert tokens.tolist() == [1, 2, 3, 4, 5, PAD, PAD, PAD]
    assert mask.tolist() == [True, False, True, True, True, False, False, False]
    assert np.flatnonzero(starts).tolist() == [0, 3, 5]
    assert reader.window(2, 7)[0].tolist() == [7, 8] + [PAD] * 6
    assert reader.manifest.sha256.startswith("a635c3f5e8d1904f")  # a checkpoint of those days names it


def test_more_shards_than_file_descriptors_to_spare(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, "MAX_OPEN_SHARDS", 2)
    reader = ShardReader(write(tmp_path, [[i] for i in range(20)], shard_tokens=1))
    for _ in range(2):
        assert [int(reader.window(i, 1)[0][0]) for i in range(19)] == list(range(19))
    assert len(reader._open) == 2


def test_an_empty_source_and_a_window_out_of_range(tmp_path):
    reader = ShardReader(write(tmp_path, []))
    assert reader.num_windows(4) == 0
    with pytest.raises(IndexError):
        reader.window(0, 4)
