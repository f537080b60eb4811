"""One safetensors file of 1-D tensors: written and hashed in one pass, read by ranges of elements. Torch-free.

The format: 8 bytes length of the header, little-endian; the header, JSON padded with spaces to 8 bytes; the tensors.
"""

import hashlib
import json
import os
import weakref
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

BYTES = {"F32": 4, "U8": 1}
CHUNK = 8 << 20  # bytes hashed and written at a time
MAX_HEADER_BYTES = 100 << 20  # safetensors' own limit


class Vector(NamedTuple):
    """A 1-D tensor of a file."""

    key: str
    dtype: str  # safetensors' name
    length: int  # elements

    @property
    def bytes(self) -> int:
        return self.length * BYTES[self.dtype]


def header(vectors: Sequence[Vector]) -> bytes:
    """What a file starts with that holds `vectors` in this order."""
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for vector in vectors:
        begin, end = end, end + vector.bytes
        entries[vector.key] = {"dtype": vector.dtype, "shape": [vector.length], "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def write(
    path: Path, head: bytes, buffers: Iterable[memoryview], progress: Callable[[int], object] = lambda size: None
) -> tuple[str, int]:
    """Write a new file: `head`, then the bytes of `buffers`. Returns its sha256 and length once it is on the disk.

    `progress` hears of every some megabytes. Raises OSError where there is no room, or a file of this name.
    """
    digest, length = hashlib.sha256(), 0
    with path.open("xb", buffering=0) as file:
        for buffer in chain([memoryview(head)], buffers):
            for start in range(0, len(buffer), CHUNK):
                chunk = buffer[start : start + CHUNK]
                digest.update(chunk)
                length += len(chunk)
                progress(len(chunk))
                while chunk:  # a disk that is nearly full takes a part of it
                    chunk = chunk[file.write(chunk) :]
        os.fsync(file.fileno())
    return digest.hexdigest(), length


def sha256(path: Path, progress: Callable[[int], object] = lambda size: None) -> str:
    """Hash of a whole file; `progress` hears of every some megabytes. Raises OSError."""
    digest = hashlib.sha256()
    chunk = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(chunk):
            digest.update(chunk[:size])
            progress(size)
    return digest.hexdigest()


class VectorFile:
    """A file of 1-D tensors, open for reading. Nothing in its header is trusted.

    Raises OSError when it cannot be read, ValueError when it is not such a file.
    """

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY)
        weakref.finalize(self, os.close, self._descriptor)
        size = os.fstat(self._descriptor).st_size
        length = int.from_bytes(os.pread(self._descriptor, 8, 0), "little")
        if length > min(MAX_HEADER_BYTES, size - 8):
            raise ValueError(f"its header claims {length:,} bytes")
        try:
            entries = json.loads(os.pread(self._descriptor, length, 8))
            del entries["__metadata__"]
            self._where = {key: self._position(entry, 8 + length, size) for key, entry in entries.items()}
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ValueError(f"its header is not readable ({type(error).__name__}: {error})") from None

    @staticmethod
    def _position(entry: dict[str, Any], data: int, size: int) -> tuple[str, int, int]:
        """(dtype, first byte, elements) of a tensor."""
        dtype, (length,), (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not 0 <= begin <= end <= size - data or end - begin != length * BYTES[dtype]:
            raise ValueError(f"{entry} does not fit")
        return dtype, data + begin, length

    def vectors(self) -> list[Vector]:
        """What it holds."""
        return [Vector(key, dtype, length) for key, (dtype, _, length) in self._where.items()]

    def read_into(self, key: str, start: int, target: memoryview) -> None:
        """Fill `target` (bytes) with the elements of tensor `key` from `start` on."""
        if key not in self._where:
            raise ValueError(f"it holds no tensor {key}")
        dtype, begin, length = self._where[key]
        if start < 0 or start * BYTES[dtype] + len(target) > length * BYTES[dtype]:
            raise ValueError(f"tensor {key} has {length:,} elements; more are wanted")
        at = begin + start * BYTES[dtype]
        while target:
            size = os.preadv(self._descriptor, [target[: 1 << 30]], at)
            if size == 0:
                raise ValueError("it ends too early")
            target, at = target[size:], at + size
