"""Data sets behind a URL (s3, gs, hf, http, memory: whatever fsspec knows), read by ranges. Torch-free.

A shard is never fetched whole: a row takes the blocks that its tokens and offsets lie in and, when a shard is opened,
the index. With a cache (block_cache.py) pieces of UNIT bytes are fetched instead, at places that do not depend on the
row, and kept. The order of samples knows nothing of all this. Every block is compared with its checksum, wherever it
came from.
"""

import time
from collections.abc import Callable
from typing import TypeVar
from urllib.parse import urlsplit

import numpy as np

from mm_train.block_cache import BlockCache
from mm_train.cli import UserError, first_line
from mm_train.manifest import DTYPES, Manifest, Shard
from mm_train.shard_file import ShardFile

UNIT = 1 << 18  # bytes fetched at a time where they are kept
WAITS = (0.5, 2.0, 8.0)  # seconds before trying again
Answer = TypeVar("Answer")


def is_url(path: object) -> bool:
    """Is this not a path of the local file system?"""
    return "://" in str(path)


class RemoteFolder:
    """A folder behind a URL. Any method raises UserError for what cannot be reached, after some attempts."""

    def __init__(self, url: str, cache: BlockCache | None = None) -> None:
        """Raises UserError for a scheme that is not known, or whose package is not installed."""
        self.url, self.cache = url.rstrip("/"), cache
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError(f"{self} needs the package fsspec: pip install 'mobilemoe-train[remote]'") from None
        try:
            self._files, self._path = url_to_fs(self.url)
        except (ImportError, ValueError) as error:  # "Install s3fs to access S3", "Protocol not known: ..."
            raise UserError(f"cannot read {self}: {first_line(error)}") from None

    def __str__(self) -> str:
        """The URL without a user's name and password."""
        parts = urlsplit(self.url)
        return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()

    def __truediv__(self, name: str) -> "RemoteFolder":
        return RemoteFolder(f"{self.url}/{name}", self.cache)

    def read(self, name: str) -> bytes:
        """A whole file. Raises FileNotFoundError when there is none."""
        return self._try(name, lambda: self._files.cat_file(f"{self._path}/{name}"))

    def read_range(self, name: str, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of a file. Raises FileNotFoundError when there is none."""
        data = self._try(name, lambda: self._files.cat_file(f"{self._path}/{name}", start=begin, end=end))
        if len(data) != end - begin:
            raise UserError(
                f"{self}/{name} gave {len(data)} bytes for the {end - begin} from {begin} on: it is truncated, or its"
                " server does not know ranges"
            )
        return data

    def sizes(self) -> dict[str, int] | None:
        """File name -> bytes; None where a folder cannot be listed, as on a web server."""
        if self.url.startswith("http"):
            return None
        listing = self._try("", lambda: self._files.ls(self._path, detail=True))
        return {str(entry["name"]).rpartition("/")[2]: entry["size"] for entry in listing if entry["type"] == "file"}

    def open_shard(self, shard: Shard, manifest: Manifest, checked: bool = True) -> "RemoteShard":
        return RemoteShard(self, shard, manifest)

    def _try(self, name: str, ask: Callable[[], Answer]) -> Answer:
        for wait in (*WAITS, None):
            try:
                return ask()
            except FileNotFoundError:
                raise
            except Exception as error:  # each of the packages behind fsspec has errors of its own
                if wait is None or isinstance(error, PermissionError):
                    raise UserError(f"cannot read {self}/{name}: {first_line(error)}") from None
                time.sleep(wait)
        raise AssertionError


class RemoteShard(ShardFile):
    """A shard that is read by ranges. Whether blocks are `checked` is not asked: they have travelled."""

    def __init__(self, folder: RemoteFolder, shard: Shard, manifest: Manifest) -> None:
        super().__init__(f"{folder}/{shard.file}", shard, manifest)
        self._folder = folder
        self._unit = self.block_bytes if folder.cache is None else max(UNIT, self.block_bytes)

    def read(self, member: str, low: int, high: int) -> np.ndarray:
        width = np.dtype(DTYPES[member]).itemsize
        first, last = low * width // self._unit, -(-high * width // self._unit)
        if self._folder.cache is None:
            pieces = self._fetched(member, first, last)
        else:
            pieces = b"".join([self._piece(member, unit) for unit in range(first, last)])
        data = pieces[low * width - first * self._unit : high * width - first * self._unit]
        return np.frombuffer(data, dtype=DTYPES[member])

    def raw(self, offset: int, size: int) -> np.ndarray:
        key = f"{self.shard.sha256}-{offset}-{size}"
        data = self._kept(key)
        if data is None or len(data) != size:
            data = self._fetch(offset, size)
            self._keep(key, data)
        return np.frombuffer(data, dtype="u1")

    def _fetched(self, member: str, first: int, last: int) -> bytes:
        """The blocks [first, last) of a member, in one request, checked."""
        place, begin = self.shard.members[member], first * self._unit
        size = min(last * self._unit, place.size) - begin
        data = self._fetch(place.offset + begin, size) if size > 0 else b""
        self._check(member, begin, data, size)
        return data

    def _piece(self, member: str, unit: int) -> bytes:
        """Bytes [unit * UNIT, (unit + 1) * UNIT) of a member, or what there is of them, checked."""
        place, key = self.shard.members[member], f"{self.shard.sha256}-{member}-{unit}"
        begin, size = unit * self._unit, min(self._unit, self.shard.members[member].size - unit * self._unit)
        data = self._kept(key)
        if data is not None:
            try:
                self._check(member, begin, data, size)
                return data
            except UserError:  # of the disk here, not of the shard there
                if self._folder.cache is not None:
                    self._folder.cache.remove(key)
        data = self._fetch(place.offset + begin, size)
        self._check(member, begin, data, size)
        self._keep(key, data)
        return data

    def _check(self, member: str, begin: int, data: bytes, size: int) -> None:
        if len(data) != size:
            raise UserError("not the length that was put there")
        view = memoryview(data)
        for at in range(0, size, self.block_bytes):
            self.check(member, (begin + at) // self.block_bytes, view[at : at + self.block_bytes])

    def _fetch(self, begin: int, size: int) -> bytes:
        try:
            return self._folder.read_range(self.shard.file, begin, begin + size)
        except FileNotFoundError:
            raise UserError(f"missing shard {self.name}: {self.shard.size} bytes expected") from None

    def _kept(self, key: str) -> bytes | None:
        return None if self._folder.cache is None else self._folder.cache.get(key)

    def _keep(self, key: str, data: bytes) -> None:
        if self._folder.cache is not None:
            self._folder.cache.put(key, data)


def read_file(url: str) -> bytes:
    """A small file behind a URL. Raises UserError when there is none or it cannot be read."""
    folder, _, name = url.rpartition("/")
    try:
        return RemoteFolder(folder).read(name)
    except FileNotFoundError:
        raise UserError(f"there is no {RemoteFolder(folder)}/{name}") from None
