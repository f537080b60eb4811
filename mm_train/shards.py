"""Token shards: the data format between data_prep and training. Torch-free.

A data set folder holds SOURCE/SPLIT/ folders, each with `manifest.json` and `00000.tar`, `00001.tar`, ... Every tar is
an ordinary webdataset shard with one sample of a few large members:

    KEY.tokens   uint32 LE, all documents one after the other
    KEY.offsets  uint64 LE, where each document starts in this shard, plus the end
    KEY.mask     uint8, one per token, 1 = trained on (only when the source has masks)
    KEY.index    uint32 LE, the crc32 of every started 16 KiB of tokens, offsets and mask, in this order; then, for each
                 started 16 KiB of tokens, the number of the first document that begins there or later, and that of all
    KEY.json     facts about the shard, for readers without the manifest

Layout "stream": documents follow one another and a training window may begin anywhere. Layout "packed": rows of
exactly `row_length` tokens; what the documents of a row leave free is padding with mask 0, one more entry in offsets.
Documents never cross shards, rows never cross shards.

The manifest knows where each member lies, so reading is memory-mapped and parses no tar. A block is compared with its
checksum when it is first touched.
"""

import bisect
import hashlib
import io
import itertools
import json
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mm_train.cli import UserError
from mm_train.files import publish
from mm_train.manifest import (
    BLOCK,
    DTYPES,
    NAME,
    Manifest,
    Member,
    Shard,
    block_crcs,
    check_one_tokenizer,
    crc32,
    missing,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from mm_train.shard_file import LocalFolder, Place, ShardFile, wrong_size

__all__ = [  # with what of the manifest others need when they handle shards
    "Manifest",
    "Member",
    "Row",
    "Shard",
    "ShardReader",
    "ShardWriter",
    "check_one_tokenizer",
    "read_manifest",
    "write_manifest",
]

TAR_BLOCK = 512  # tar aligns members to this, so uint64 views of a mapped shard are aligned
PIECE = 1 << 24  # bytes hashed at a time
MAX_OPEN_SHARDS = 32  # of a source: a mapped file holds a file descriptor


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
        revision: str | None = None,
        config_sha256: str | None = None,
        block_bytes: int = BLOCK,
        number: str | None = None,
    ):
        """Start FOLDER/SOURCE/SPLIT. A shard is closed once it holds `shard_tokens`. Raises OSError if not writable.

        `revision` is that of the data set that the text is from, `config_sha256` names the configuration used,
        `block_bytes` are under one checksum. `number` stands in the names of members instead of the shard's own, for
        one that joins others later.
        """
        if layout != ("packed" if row_length else "stream") or (row_length and not has_mask):
            raise ValueError(f"layout {layout!r} with row_length {row_length} and has_mask {has_mask}")
        self.folder = folder / source / split
        self._facts: dict[str, Any] = {
            "source": source,
            "split": split,
            "licence": licence,
            "domain": domain,
            "layout": layout,
            "row_length": row_length,
            "has_mask": has_mask,
            "vocab_size": vocab_size,
            "tokenizer_sha256": tokenizer_sha256,
            "revision": revision,
            "config_sha256": config_sha256,
            "block_bytes": block_bytes,
        }
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
        arrays["index"] = _index(arrays, self._facts["block_bytes"])
        key = f"{self._facts['source']}-{self._facts['split']}-{self._number or f'{index:05d}'}"
        facts = {**self._facts, "index": index, "num_tokens": self._filled, "num_documents": len(lengths)}
        members: dict[str, Member] = {}
        file = self.folder / f"{index:05d}.tar"
        temporary = file.with_name(file.name + ".tmp")
        with temporary.open("wb") as out:
            hashed = _HashingFile(out)
            for name, array in arrays.items():
                data = memoryview(array.data).cast("B")
                members[name] = Member(_write_member(hashed, f"{key}.{name}", data), len(data))
            _write_member(hashed, f"{key}.json", memoryview(json.dumps(facts, sort_keys=True).encode()))
            end_mark = 2 * TAR_BLOCK
            hashed.write(bytes(end_mark + -(hashed.position + end_mark) % tarfile.RECORDSIZE))
            out.flush()
            os.fsync(out.fileno())
        publish(temporary, file)
        sha256, index_crc32 = hashed.sha256.hexdigest(), crc32(arrays["index"].data)
        self._shards.append(Shard(file.name, hashed.position, sha256, self._filled, len(lengths), members, index_crc32))
        self._start_shard()


class Row(NamedTuple):
    """A window as it lies in the shard: tokens uint32 [T + 1], mask uint8 [T + 1] (None: all are trained on), and where
    documents begin in it, ascending, int64. Views of memory-mapped files where possible: not to be written to.
    """

    tokens: np.ndarray
    mask: np.ndarray | None
    starts: np.ndarray


class ShardReader:
    """Random access to the windows of one SOURCE/SPLIT folder.

    Attributes: `folder`, `manifest`, `num_tokens`. Cheap to open: only the manifest is read and, where a folder can be
    listed, file sizes are looked up. May be used by several threads.
    """

    def __init__(self, folder: str | Path | Place, checked: bool = True):
        """`folder` is a path, or a remote.RemoteFolder.

        `checked`: compare each block with its crc32 when it is first read, whole, for the sake of any window in it.
        Raises UserError when the manifest is missing or damaged, or a shard is missing or of the wrong size.
        """
        self.folder: Place = LocalFolder(Path(folder)) if isinstance(folder, str | Path) else folder
        try:
            data = self.folder.read(NAME)
        except (FileNotFoundError, NotADirectoryError):
            raise missing(str(self.folder)) from None
        except PermissionError as error:
            raise UserError(f"cannot read {self.folder}/{NAME}: {error.strerror}") from None
        self.manifest = parse_manifest(data, f"{self.folder}/{NAME}")
        self.num_tokens = self.manifest.num_tokens
        shards = self.manifest.shards
        # Of shards, in tokens, plus the end.
        self._starts = list(itertools.accumulate((shard.num_tokens for shard in shards), initial=0))
        self._checked = checked
        self._open: OrderedDict[int, ShardFile] = OrderedDict()
        self._lock = threading.Lock()
        sizes = self.folder.sizes()
        for shard in shards:
            size = shard.size if sizes is None else sizes.get(shard.file)
            if size is None:
                file = f"{self.folder}/{shard.file}"
                raise UserError(f"missing shard {file}: {shard.size} bytes expected; prepare the data again")
            if size != shard.size:
                raise wrong_size(f"{self.folder}/{shard.file}", size, shard.size)

    def num_windows(self, seq_len: int) -> int:
        """See Manifest.num_windows."""
        return self.manifest.num_windows(seq_len)

    def row(self, index: int, seq_len: int) -> Row:
        """Window `index`.

        In a stream, window i is tokens [i * seq_len, (i + 1) * seq_len + 1), so each token is a label once; packed, it
        is row i. Raises UserError for a corrupt block.
        """
        if not 0 <= index < self.num_windows(seq_len):
            raise IndexError(f"window {index} of {self.num_windows(seq_len)}")
        begin = index * (seq_len if self.manifest.row_length is None else seq_len + 1)
        return self._range(begin, begin + seq_len + 1)

    def window(self, index: int, seq_len: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The same as tokens uint32, mask bool (trained on) and starts bool (begins a document), all [seq_len + 1]."""
        return _dense(self.row(index, seq_len))

    def span(self, begin: int, end: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, mask and starts (see `window`) of the tokens [begin, end) of the whole source."""
        return _dense(self._range(begin, end))

    def documents(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Every document in order as (tokens uint32, mask bool); in a packed source, padding runs are among them."""
        for index, shard in enumerate(self.manifest.shards):
            opened = self.shard(index)
            offsets = opened.read("offsets", 0, shard.members["offsets"].size // 8)
            for low, high in itertools.pairwise(offsets.tolist()):
                if self.manifest.has_mask:
                    mask = opened.read("mask", low, high).astype(np.bool_)
                else:
                    mask = np.ones(high - low, dtype=np.bool_)
                yield opened.read("tokens", low, high), mask

    def verify(self) -> None:
        """Read everything and compare the sha256 of each shard. Raises UserError naming the first that differs."""
        for index, shard in enumerate(self.manifest.shards):
            hashed, opened = hashlib.sha256(), self.shard(index)
            for begin in range(0, shard.size, PIECE):
                hashed.update(opened.raw(begin, min(PIECE, shard.size - begin)).data)
            if hashed.hexdigest() != shard.sha256:
                found = f"sha256 {hashed.hexdigest()}, expected {shard.sha256}"
                raise UserError(f"corrupt shard {self.folder}/{shard.file}: {found}")

    def shard(self, index: int) -> ShardFile:
        """Shard `index`, opened; at most MAX_OPEN_SHARDS stay so."""
        with self._lock:
            opened = self._open.get(index)
            if opened is None:
                if len(self._open) >= MAX_OPEN_SHARDS:
                    self._open.popitem(last=False)
                shard = self.manifest.shards[index]
                opened = self.folder.open_shard(shard, self.manifest, self._checked)
                self._open[index] = opened
            return opened

    def _range(self, begin: int, end: int) -> Row:
        """Tokens [begin, end) of the whole source."""
        shard = bisect.bisect_right(self._starts, begin) - 1
        pieces = []
        while True:
            first, last = self._starts[shard], self._starts[shard + 1]
            pieces.append(self._piece(shard, begin - first, min(end, last) - first))
            if end <= last:
                break
            begin, shard = last, shard + 1
        if len(pieces) == 1:
            return pieces[0]
        places = itertools.accumulate((len(piece.tokens) for piece in pieces), initial=0)
        return Row(
            np.concatenate([piece.tokens for piece in pieces]),
            np.concatenate([piece.mask for piece in pieces if piece.mask is not None])
            if pieces[0].mask is not None
            else None,
            np.concatenate([piece.starts + place for piece, place in zip(pieces, places, strict=False)]),
        )

    def _piece(self, shard: int, low: int, high: int) -> Row:
        """Tokens [low, high) of a shard."""
        opened = self.shard(shard)
        mask = opened.read("mask", low, high) if self.manifest.has_mask else None
        return Row(opened.read("tokens", low, high), mask, opened.starts(low, high))


def _dense(row: Row) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    starts = np.zeros(len(row.tokens), dtype=np.bool_)
    starts[row.starts] = True
    mask = np.ones(len(row.tokens), dtype=np.bool_) if row.mask is None else row.mask.astype(np.bool_)
    return row.tokens, mask, starts


def _index(arrays: dict[str, np.ndarray], block_bytes: int) -> np.ndarray:
    """The member `index` (see above) of the other members."""
    crcs = [crc for array in arrays.values() for crc in block_crcs(memoryview(array.data).cast("B"), block_bytes)]
    step = block_bytes // arrays["tokens"].itemsize
    borders = np.arange(0, len(arrays["tokens"]) + step, step)
    return np.array([*crcs, *np.searchsorted(arrays["offsets"].view(np.int64), borders)], dtype=DTYPES["index"])


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
