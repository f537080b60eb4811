"""Token shards: the data format between data_prep and training. Torch-free.

A data set folder holds SOURCE/SPLIT/ folders, each with `manifest.json` and `00000.tar`, `00001.tar`, ... Every tar is
an ordinary webdataset shard with one sample of a few large members:

    KEY.tokens   uint32 LE, all documents one after the other
    KEY.offsets  uint64 LE, where each document starts in this shard, plus the end
    KEY.mask     uint8, one per token, 1 = trained on (only when the source has masks)
    KEY.json     facts about the shard, for readers without the manifest

Layout "stream": documents follow one another and a training window may begin anywhere. Layout "packed": rows of
exactly `row_length` tokens; what the documents of a row leave free is padding with mask 0, one more entry in offsets.
Documents never cross shards, rows never cross shards.

The manifest knows where each member lies, so reading is memory-mapped and parses no tar. Members are checksummed in
blocks of 1 MiB, and a block is checked when it is first touched.
"""

import dataclasses
import hashlib
import io
import itertools
import json
import os
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm_train.cli import UserError
from mm_train.files import publish, write_atomic

FORMAT = "mobilemoe-shards-1"
BLOCK = 1 << 20  # bytes under one crc32
TAR_BLOCK = 512  # tar aligns members to this, so uint64 views of a mapped shard are aligned
MAX_OPEN_SHARDS = 64  # a mapped file holds a file descriptor
DTYPES = {"tokens": "<u4", "offsets": "<u8", "mask": "u1"}


@dataclasses.dataclass(frozen=True)
class Member:
    """Where one array lies in its shard: byte offset and size, and the crc32 of every started 1 MiB of it."""

    offset: int
    size: int
    crc32: list[int]


class Shard(NamedTuple):
    """One tar: file name, size in bytes, sha256 of the file, what it holds and where."""

    file: str
    size: int
    sha256: str
    num_tokens: int
    num_documents: int
    members: dict[str, Member]


@dataclasses.dataclass(frozen=True)
class Manifest:
    """Everything known about one source and split. `sha256` is that of the manifest file and identifies the data."""

    source: str
    split: str
    licence: str
    domain: str
    layout: str
    row_length: int | None
    has_mask: bool
    vocab_size: int
    tokenizer_sha256: str
    num_tokens: int  # padding included
    num_padding: int
    num_documents: int  # padding is not a document here
    num_bytes: int  # of UTF-8 text that went in
    extra: dict[str, Any]
    shards: list[Shard]
    sha256: str = ""


class ShardWriter:
    """Writes the shards of one source and split, then the manifest.

    Shards appear under their final names whole or not at all, and the manifest appears last: a folder without one is
    unfinished work. An earlier version in the folder is removed first, its manifest before its shards.
    """

    def __init__(
        self,
        folder: Path,
        source: str,
        split: str,
        *,
        tokenizer_sha256: str,
        vocab_size: int,
        licence: str,
        domain: str,
        layout: str = "stream",
        row_length: int | None = None,
        has_mask: bool = False,
        shard_tokens: int = 1 << 25,
        number: str | None = None,
    ):
        """Start FOLDER/SOURCE/SPLIT. A shard is closed once it holds `shard_tokens`. `number` stands in member names
        instead of the shard's own, for one that joins others later. Raises OSError if not writable."""
        if layout != ("packed" if row_length else "stream") or (row_length and not has_mask):
            raise ValueError(f"layout {layout!r} with row_length {row_length} and has_mask {has_mask}")
        self.folder = folder / source / split
        self._facts: dict[str, Any] = {"source": source, "split": split, "licence": licence, "domain": domain}
        self._facts |= {"layout": layout, "row_length": row_length, "has_mask": has_mask}
        self._facts |= {"vocab_size": vocab_size, "tokenizer_sha256": tokenizer_sha256}
        self._row_length, self._has_mask, self._vocab_size = row_length, has_mask, vocab_size
        self._shard_tokens, self._number = shard_tokens, number
        self._shards: list[Shard] = []
        self._num_padding = self._num_documents = self._num_bytes = 0
        self._start_shard()
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "manifest.json").unlink(missing_ok=True)
        for stale in [*self.folder.glob("*.tar"), *self.folder.glob("*.tmp")]:
            stale.unlink()

    def add(
        self, tokens: Sequence[int] | np.ndarray, mask: Sequence[bool] | np.ndarray | None = None, num_bytes: int = 0
    ) -> None:
        """Add one document: its ids, its mask when the source has masks, and the bytes of text it was made from."""
        ids = np.asarray(tokens, dtype="<u4")
        if len(ids) == 0 or int(ids.max()) >= self._vocab_size:
            raise ValueError(f"a document needs tokens, all below the vocabulary size {self._vocab_size}")
        if (mask is not None) != self._has_mask or (mask is not None and len(mask) != len(ids)):
            raise ValueError("one mask entry per token is needed exactly when the source has masks")
        if self._row_length is not None and self._filled % self._row_length + len(ids) > self._row_length:
            raise ValueError(f"a document of {len(ids)} tokens crosses the row of {self._row_length}: end_row first")
        self._append(ids, mask)
        self._num_documents += 1
        self._num_bytes += num_bytes
        if self._row_length is None and self._filled >= self._shard_tokens:
            self._write_shard()

    def end_row(self, pad_id: int) -> None:
        """Fill the rest of the current row (packed layout) with padding, mask 0."""
        assert self._row_length is not None
        free = -self._filled % self._row_length
        if free:
            self._append(np.full(free, pad_id, dtype="<u4"), np.zeros(free, dtype="u1"))
            self._num_padding += free
        if self._filled >= self._shard_tokens:
            self._write_shard()

    def close(self, extra: dict[str, Any] | None = None) -> Manifest:
        """Write what is left, then the manifest with `extra`; from here on the shards can be read."""
        if self._filled:
            self._write_shard()
        manifest = Manifest(
            **self._facts,
            num_tokens=sum(shard.num_tokens for shard in self._shards),
            num_padding=self._num_padding,
            num_documents=self._num_documents,
            num_bytes=self._num_bytes,
            extra=extra or {},
            shards=self._shards,
        )
        return write_manifest(self.folder, manifest)

    def _start_shard(self) -> None:
        self._tokens: list[np.ndarray] = []
        self._masks: list[np.ndarray] = []
        self._filled = 0  # tokens

    def _append(self, ids: np.ndarray, mask: Sequence[bool] | np.ndarray | None) -> None:
        self._tokens.append(ids)
        if mask is not None:
            self._masks.append(np.asarray(mask, dtype="u1"))
        self._filled += len(ids)

    def _write_shard(self) -> None:
        index = len(self._shards)
        lengths = [len(ids) for ids in self._tokens]
        arrays = {
            "tokens": np.concatenate(self._tokens),
            "offsets": np.cumsum([0, *lengths]).astype(DTYPES["offsets"]),
        }
        if self._has_mask:
            arrays["mask"] = np.concatenate(self._masks)
        key = f"{self._facts['source']}-{self._facts['split']}-{self._number or f'{index:05d}'}"
        facts = {**self._facts, "index": index, "num_tokens": self._filled, "num_documents": len(lengths)}
        members: dict[str, Member] = {}
        temporary = (file := self.folder / f"{index:05d}.tar").with_name(f"{index:05d}.tar.tmp")
        with temporary.open("wb") as out:
            hashed = _HashingFile(out)
            for name, array in arrays.items():
                data = memoryview(array.data).cast("B")
                offset = _write_member(hashed, f"{key}.{name}", data)
                members[name] = Member(offset, len(data), _block_crcs(data))
            _write_member(hashed, f"{key}.json", memoryview(json.dumps(facts, sort_keys=True).encode()))
            end = hashed.position + 2 * TAR_BLOCK
            hashed.write(bytes(2 * TAR_BLOCK + -end % tarfile.RECORDSIZE))
            out.flush()
            os.fsync(out.fileno())
        publish(temporary, file)
        self._shards.append(
            Shard(file.name, hashed.position, hashed.sha256.hexdigest(), self._filled, len(lengths), members)
        )
        self._start_shard()


class ShardReader:
    """Random access to the windows of one SOURCE/SPLIT folder.

    Attributes: `folder`, `manifest`, `num_tokens`. Cheap to open: only the manifest is read and file sizes are looked
    up. Not thread-safe; each data worker opens its own.
    """

    def __init__(self, folder: str | Path):
        """Raises UserError when the manifest is missing or damaged, or a shard is missing or of the wrong size."""
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        self.num_tokens = self.manifest.num_tokens
        shards = self.manifest.shards
        self._starts = np.cumsum([0, *(shard.num_tokens for shard in shards)])  # of shards, in tokens, plus the end
        self._open: dict[int, np.ndarray] = {}
        self._checked: dict[tuple[int, str], np.ndarray] = {}
        for shard in shards:
            file = self.folder / shard.file
            try:
                size = file.stat().st_size
            except FileNotFoundError:
                raise UserError(f"missing shard {file}: {shard.size} bytes expected; prepare the data again") from None
            if size != shard.size:
                fault = f"{'truncated' if size < shard.size else 'overlong'} shard {file}"
                raise UserError(f"{fault}: {size} bytes found, {shard.size} expected; prepare the data again")

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` inputs there are (each holds one token more, for the labels)."""
        row_length = self.manifest.row_length
        if row_length is None:
            return max(0, (self.num_tokens - 1) // seq_len)
        if row_length != seq_len + 1:
            raise UserError(
                f"{self.folder} is packed in rows of {row_length} tokens, which suits a sequence length of "
                f"{row_length - 1}, not {seq_len}: change the sequence length or prepare with row_length {seq_len + 1}"
            )
        return self.num_tokens // row_length

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Window `index`: tokens uint32, mask bool (trained on), starts bool (begins a document), all [seq_len + 1].

        In a stream, window i is tokens [i * seq_len, (i + 1) * seq_len + 1), so each token is a label once; packed, it
        is row i. Without masks in the source the mask is True. Raises UserError for a corrupt block.
        """
        if not 0 <= index < self.num_windows(seq_len):
            raise IndexError(f"window {index} of {self.num_windows(seq_len)}")
        begin = index * (seq_len if self.manifest.row_length is None else seq_len + 1)
        return self.span(begin, begin + seq_len + 1)

    def span(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, mask and starts (see `window`) of the tokens [begin, end) of the whole source."""
        tokens = np.empty(end - begin, dtype=np.uint32)
        mask = np.ones(end - begin, dtype=np.bool_)
        starts = np.zeros(end - begin, dtype=np.bool_)
        shard = int(np.searchsorted(self._starts, begin, side="right")) - 1
        while begin < end:
            first = int(self._starts[shard])
            stop = min(end, int(self._starts[shard + 1]))
            low, high = begin - first, stop - first  # within the shard
            out = slice(len(tokens) - (end - begin), len(tokens) - (end - stop))
            tokens[out] = self._read(shard, "tokens", low, high)
            if self.manifest.has_mask:
                mask[out] = self._read(shard, "mask", low, high)
            offsets = self._read(shard, "offsets", 0, self._length(shard, "offsets"))
            inside = offsets[np.searchsorted(offsets, low) : np.searchsorted(offsets, high)]
            starts[out.start + (inside.astype(np.int64) - low)] = True
            begin, shard = stop, shard + 1
        return tokens, mask, starts

    def documents(self) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """Every document in order as (tokens uint32, mask bool); in a packed source, padding runs are among them."""
        for shard in range(len(self.manifest.shards)):
            offsets = self._read(shard, "offsets", 0, self._length(shard, "offsets")).astype(np.int64)
            for low, high in itertools.pairwise(offsets + self._starts[shard]):
                tokens, mask, _ = self.span(int(low), int(high))
                yield tokens, mask

    def verify(self) -> None:
        """Read everything and compare the sha256 of each shard. Raises UserError naming the first that differs."""
        for shard in self.manifest.shards:
            with (self.folder / shard.file).open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != shard.sha256:
                raise UserError(f"corrupt shard {self.folder / shard.file}: sha256 {found}, expected {shard.sha256}")

    def _length(self, shard: int, name: str) -> int:
        return self.manifest.shards[shard].members[name].size // np.dtype(DTYPES[name]).itemsize

    def _read(self, shard: int, name: str, low: int, high: int) -> np.ndarray:
        """Elements [low, high) of a member, as a view of the mapped file, after checking the blocks they lie in."""
        member, dtype = self.manifest.shards[shard].members[name], np.dtype(DTYPES[name])
        data = self._map(shard)[member.offset : member.offset + member.size]
        checked = self._checked.setdefault((shard, name), np.zeros(len(member.crc32), dtype=np.bool_))
        first, last = low * dtype.itemsize // BLOCK, -(-high * dtype.itemsize // BLOCK)
        for block in first + np.flatnonzero(~checked[first:last]):
            if zlib.crc32(data[block * BLOCK : (block + 1) * BLOCK].data) != member.crc32[block]:
                raise UserError(
                    f"corrupt block in shard {self.folder / self.manifest.shards[shard].file}: the {name} at byte "
                    f"{member.offset + block * BLOCK} do not match their crc32; copy or prepare the data again"
                )
            checked[block] = True
        return data.view(dtype)[low:high]

    def _map(self, shard: int) -> np.ndarray:
        if shard not in self._open:
            if len(self._open) >= MAX_OPEN_SHARDS:
                del self._open[next(iter(self._open))]
            mapped = np.memmap(self.folder / self.manifest.shards[shard].file, dtype="u1", mode="r")
            self._open[shard] = np.asarray(mapped)  # a plain view of the map: slices of np.memmap itself are slow
        return self._open[shard]


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json whole or not at all; returns the manifest with its sha256. Raises OSError."""
    facts = dataclasses.asdict(manifest)
    facts["shards"] = [shard._asdict() for shard in facts["shards"]]
    del facts["sha256"]
    content = {"format": FORMAT, "checksum": _checksum(facts), **facts}
    write_atomic(folder / "manifest.json", (json.dumps(content, indent=1) + "\n").encode())
    return read_manifest(folder)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a SOURCE/SPLIT folder. Raises UserError when it is missing, damaged or of another format."""
    file = folder / "manifest.json"
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(
            f"no shards in {folder}: {file} is missing (not prepared, or the preparation was cut short)"
        ) from None
    try:
        content = json.loads(data)
        if content.pop("format") != FORMAT:
            raise UserError(f"{file} is not in the format {FORMAT}: prepare the data with this version")
        if content.pop("checksum") != _checksum(content):
            raise ValueError("its checksum does not match its content")
        if any(shard["file"] != f"{index:05d}.tar" for index, shard in enumerate(content["shards"])):
            raise ValueError("its shards are not 00000.tar, 00001.tar, ... in its own folder")
        shards = [
            Shard(**{**shard, "members": {name: Member(**member) for name, member in shard["members"].items()}})
            for shard in content.pop("shards")
        ]
        return Manifest(**content, shards=shards, sha256=hashlib.sha256(data).hexdigest())
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"damaged manifest {file}: {error}; prepare the data again") from None


def check_one_tokenizer(manifests: Iterable[Manifest], tokenizer_sha256: str | None = None) -> None:
    """Raise UserError unless all sources were encoded with one tokenizer (that with `tokenizer_sha256`, if given)."""
    expected, owner = tokenizer_sha256, "the tokenizer in use"
    for manifest in manifests:
        name = f"source {manifest.source}/{manifest.split}"
        if expected is None:
            expected, owner = manifest.tokenizer_sha256, name
        if manifest.tokenizer_sha256 != expected:
            raise UserError(
                f"tokenizer mismatch: {name} was encoded with {manifest.tokenizer_sha256[:12]}, "
                f"{owner} has {expected[:12]}; prepare them with one tokenizer"
            )


class _HashingFile:
    """The write side of a file that knows its position and the sha256 so far."""

    def __init__(self, file: io.BufferedWriter):
        self._file, self.position, self.sha256 = file, 0, hashlib.sha256()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self.sha256.update(data)
        self.position += len(data)


def _write_member(out: _HashingFile, name: str, data: memoryview) -> int:
    """Append one file to a tar; returns the byte offset of its content. Facts that vary (time, owner) are left out."""
    header = tarfile.TarInfo(name)
    header.size = len(data)
    out.write(header.tobuf(tarfile.USTAR_FORMAT))
    offset = out.position
    out.write(data)
    out.write(bytes(-out.position % TAR_BLOCK))
    return offset


def _block_crcs(data: memoryview) -> list[int]:
    return [zlib.crc32(data[start : start + BLOCK]) for start in range(0, len(data), BLOCK)]


def _checksum(facts: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
