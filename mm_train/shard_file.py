"""One shard, opened: ranges of its members, each block of them compared with its crc32 when it is first read.

Torch-free. `LocalShard` is a memory map; remote.py has the same for shards behind a URL.
"""

import os
from abc import ABC, abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from mm_train.cli import UserError
from mm_train.manifest import DTYPES, Manifest, Shard, crc32


class ShardFile(ABC):
    """`name` is a path or URL for messages. May be read by several threads."""

    def __init__(self, name: str, shard: Shard, manifest: Manifest) -> None:
        self.name, self.shard, self.block_bytes = name, shard, manifest.block_bytes
        self.sizes = {member: place.size for member, place in shard.members.items() if member != "index"}

    @abstractmethod
    def read(self, member: str, low: int, high: int) -> np.ndarray:
        """Elements [low, high) of a member, read-only. Raises UserError for a corrupt block."""

    @abstractmethod
    def raw(self, offset: int, size: int) -> np.ndarray:
        """Bytes of the file, uint8, unchecked."""

    def starts(self, low: int, high: int) -> np.ndarray:
        """Which of the tokens [low, high) begin a document: positions relative to `low`, ascending, int64."""
        documents, block = self.first_documents, self.block_bytes // 4  # tokens
        if documents is None:
            begin, end = 0, self.sizes["offsets"] // 8
        else:
            begin, end = int(documents[low // block]), int(documents[-(-high // block)])
        offsets = self.read("offsets", begin, end).view(np.int64)
        first_inside, beyond = offsets.searchsorted((low, high)).tolist()
        return offsets[first_inside:beyond] - low

    def check(self, member: str, block: int, data: memoryview) -> None:
        """Raises UserError unless `data` is the block of a member that was written."""
        if crc32(data) != self._crcs[member][block]:
            raise UserError(
                f"corrupt block in shard {self.name}: the {member} at byte"
                f" {self.shard.members[member].offset + block * self.block_bytes} do not match their crc32; copy or"
                " prepare the data again"
            )

    @cached_property
    def _index(self) -> np.ndarray:
        """The member of that name: checksums of all blocks, then the first document of each block of tokens."""
        place = self.shard.members["index"]
        data = self.raw(place.offset, place.size)
        if crc32(data.data) != self.shard.index_crc32:
            raise UserError(f"corrupt index in shard {self.name}: copy or prepare the data again")
        return data.view(DTYPES["index"])

    @cached_property
    def _crcs(self) -> dict[str, list[int] | np.ndarray]:
        if self.shard.crc32 is not None:
            return dict(self.shard.crc32)
        crcs: dict[str, list[int] | np.ndarray] = {}
        begin = 0
        for member, size in self.sizes.items():
            count = -(-size // self.block_bytes)
            crcs[member] = self._index[begin : begin + count]
            begin += count
        return crcs

    @cached_property
    def first_documents(self) -> np.ndarray | None:
        """Number of the first document that begins in or after each block of tokens, and of all; None in format 1."""
        return None if self.shard.crc32 is not None else self._index[sum(map(len, self._crcs.values())) :]


class Place(Protocol):
    """A folder of shards, here or elsewhere. `str` of it is for messages."""

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError when there is none."""

    def sizes(self) -> dict[str, int] | None:
        """File name -> bytes; None where a folder cannot be listed."""

    def open_shard(self, shard: Shard, manifest: Manifest, checked: bool) -> ShardFile:
        """Raises UserError when it is missing or of another size."""


class LocalFolder:
    """A Place in the local file system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __str__(self) -> str:
        return str(self.path)

    def read(self, name: str) -> bytes:
        return (self.path / name).read_bytes()

    def sizes(self) -> dict[str, int]:
        with os.scandir(self.path) as entries:
            return {entry.name: entry.stat().st_size for entry in entries}

    def open_shard(self, shard: Shard, manifest: Manifest, checked: bool) -> ShardFile:
        return LocalShard(self.path / shard.file, shard, manifest, checked)


class LocalShard(ShardFile):
    """A shard in a folder, memory-mapped; what is read are views of the map. `checked`: blocks are compared."""

    def __init__(self, path: Path, shard: Shard, manifest: Manifest, checked: bool = True) -> None:
        super().__init__(str(path), shard, manifest)
        # A plain view of the map: slices of np.memmap itself are slow.
        self._map = np.asarray(np.memmap(path, dtype="u1", mode="r"))
        if len(self._map) != shard.size:
            raise wrong_size(str(path), len(self._map), shard.size)
        self._arrays = {
            member: self._map[place.offset : place.offset + place.size].view(DTYPES[member])
            for member, place in shard.members.items()
        }
        self._bytes = {member: memoryview(array.data).cast("B") for member, array in self._arrays.items()}
        self._unchecked = {
            member: bytearray([checked]) * -(-size // self.block_bytes) for member, size in self.sizes.items()
        }

    def read(self, member: str, low: int, high: int) -> np.ndarray:
        array, unchecked = self._arrays[member], self._unchecked[member]
        width, block_bytes = array.itemsize, self.block_bytes
        block, last = low * width // block_bytes, -(-high * width // block_bytes)
        while (block := unchecked.find(1, block, last)) >= 0:
            self.check(member, block, self._bytes[member][block * block_bytes : (block + 1) * block_bytes])
            unchecked[block] = 0
        return array[low:high]

    def raw(self, offset: int, size: int) -> np.ndarray:
        return self._map[offset : offset + size]


def wrong_size(name: str, found: int, expected: int) -> UserError:
    fault = f"{'truncated' if found < expected else 'overlong'} shard {name}"
    return UserError(f"{fault}: {found} bytes found, {expected} expected; prepare the data again")
