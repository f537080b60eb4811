import hashlib
import json
import os

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mm_train.checkpoint import files
from mm_train.checkpoint.files import Vector, VectorFile, header, sha256, write


def save(path, tensors):
    names = {torch.float32: "F32", torch.uint8: "U8"}
    head = header([Vector(key, names[tensor.dtype], tensor.numel()) for key, tensor in tensors.items()])
    return write(path, head, [memoryview(tensor.numpy()).cast("B") for tensor in tensors.values()])


@pytest.fixture
def tensors():
    return {"weight/a": torch.randn(1000), "weight/b@3": torch.randn(7), "rng": torch.arange(13, dtype=torch.uint8)}


def test_safetensors_reads_it_and_the_hash_is_right(tensors, tmp_path, monkeypatch):
    monkeypatch.setattr(files, "CHUNK", 100)
    digest, size = save(tmp_path / "a", tensors)
    content = (tmp_path / "a").read_bytes()
    assert (digest, size) == (hashlib.sha256(content).hexdigest(), len(content))
    seen = []
    assert sha256(tmp_path / "a", seen.append) == digest
    assert sum(seen) == size
    loaded = load_file(tmp_path / "a")
    assert loaded.keys() == tensors.keys()
    assert all(torch.equal(loaded[key], tensors[key]) for key in tensors)
    assert int.from_bytes(content[:8], "little") % 8 == 0


def test_what_safetensors_writes_is_read_as_well(tensors, tmp_path):
    save_file(tensors, tmp_path / "a", {"format": "pt"})
    target = torch.empty(5)
    VectorFile(tmp_path / "a").read_into("weight/a", 10, target.numpy().data.cast("B"))
    assert torch.equal(target, tensors["weight/a"][10:15])


@given(st.integers(0, 20), st.integers(0, 20))
def test_any_range_is_read(tmp_path_factory, start, length):
    path = tmp_path_factory.mktemp("ranges") / "a"
    save(path, {"first": torch.randn(3), "a": torch.arange(20.0)})
    target = torch.full((length,), -1.0)
    buffer = target.numpy().data.cast("B") if length else memoryview(bytearray())
    if start + length > 20:
        with pytest.raises(ValueError, match="has 20 elements"):
            VectorFile(path).read_into("a", start, buffer)
    else:
        VectorFile(path).read_into("a", start, buffer)
        assert torch.equal(target, torch.arange(20.0)[start : start + length])


def test_a_write_in_portions_is_carried_on(tensors, tmp_path, monkeypatch):
    """The system may take a part of what it is given."""
    import io

    class Slow(io.FileIO):
        def write(self, data):
            return super().write(data[: max(1, len(data) // 3)])

    monkeypatch.setattr(type(tmp_path), "open", lambda path, mode, buffering: Slow(path, "xb"))
    digest, _size = save(tmp_path / "a", tensors)
    monkeypatch.undo()
    assert sha256(tmp_path / "a") == digest
    assert torch.equal(load_file(tmp_path / "a")["weight/a"], tensors["weight/a"])


def test_a_file_that_is_there_is_not_overwritten(tensors, tmp_path):
    save(tmp_path / "a", tensors)
    with pytest.raises(FileExistsError):
        save(tmp_path / "a", tensors)


def crafted(entries, data=b"", claim=None):
    text = entries if isinstance(entries, bytes) else json.dumps({"__metadata__": {}} | entries).encode()
    return (len(text) if claim is None else claim).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\1\0\0",
        crafted({}, claim=1 << 60),
        crafted({}, claim=200),
        crafted(b"not JSON"),
        crafted(b"[1]"),
        crafted(b"{}"),
        crafted(b"[" * 100_000),
        crafted({"a": 1}),
        crafted({"a": {"dtype": "F32"}}),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, bytes(7)),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, bytes(8)),
        crafted({"a": {"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}}, bytes(8)),
        crafted({"a": {"dtype": "F32", "shape": [1, 2], "data_offsets": [0, 8]}}, bytes(8)),
        crafted({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, bytes(8)),
        crafted({"a": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}, bytes(8)),
    ],
)
def test_a_header_is_not_trusted(tmp_path, content):
    (tmp_path / "a").write_bytes(content)
    with pytest.raises(ValueError, match="header"):
        VectorFile(tmp_path / "a")


def test_a_missing_tensor_and_a_file_cut_short_meanwhile_are_errors(tensors, tmp_path):
    save(tmp_path / "a", tensors)
    file = VectorFile(tmp_path / "a")
    with pytest.raises(ValueError, match="no tensor weight/c"):
        file.read_into("weight/c", 0, memoryview(bytearray(4)))
    os.truncate(tmp_path / "a", 1000)
    with pytest.raises(ValueError, match="ends too early"):
        file.read_into("weight/a", 0, memoryview(bytearray(4000)))
