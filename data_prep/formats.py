"""Rows out of corpus files: parquet, JSON lines (plain, gzip, zstandard), arrow, text. Local paths or fsspec URLs.

A large file is read in slices, so that several processes can share it: row groups of a parquet file, byte ranges of
uncompressed JSON lines. Other files are one slice.
"""

import contextlib
import gzip
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from data_prep.documents import Unusable
from mm_train.cli import UserError, first_line

JSON_SUFFIXES = (".jsonl", ".json", ".ndjson")
TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".pod")
PACKED = {"gz": "gzip", "zst": "zstandard", "zstd": "zstandard"}  # what follows JSON_SUFFIXES
SUFFIXES = (".parquet", ".arrow", *JSON_SUFFIXES, *(f".json.{end}" for end in PACKED), *TEXT_SUFFIXES)

Row = dict[str, Any]


@dataclass(frozen=True)
class Slice:
    """Part of a file. `begin` and `end` count row groups of a parquet file and bytes of JSON lines; end None: all.

    `size` is its part of the bytes of the file, for planning and for progress.
    """

    file: str
    size: int
    begin: int = 0
    end: int | None = None


def is_known(file: str) -> bool:
    """Whether `rows` can read a file of this name."""
    return _kind(file) != ""


def cut(file: str, size: int, part_bytes: int) -> list[Slice]:
    """A file as slices of about `part_bytes`, where its format allows it."""
    kind = _kind(file)
    if size <= part_bytes or kind not in ("parquet", "json"):
        return [Slice(file, size)]
    if kind == "json":
        borders = [*range(0, size, part_bytes), size]
        return [Slice(file, end - begin, begin, end) for begin, end in itertools.pairwise(borders)]
    with _parquet(file) as parquet:
        groups = parquet.num_row_groups
    count = min(groups, -(-size // part_bytes))
    borders = [groups * i // count for i in range(count + 1)]
    return [Slice(file, size * (end - begin) // groups, begin, end) for begin, end in itertools.pairwise(borders)]


def rows(piece: Slice, columns: Sequence[str]) -> Iterator[Row | Unusable]:
    """The rows of a slice, in order, with at least those of `columns` that they have.

    Raises UserError for a file that is missing or damaged, as half a file must not pass for a whole one.
    """
    kind = _kind(piece.file)
    try:
        if kind == "parquet":
            yield from _parquet_rows(piece, columns)
        elif kind == "arrow":
            yield from _arrow_rows(piece, columns)
        elif kind == "text":
            with _open(piece.file) as file:
                data = file.read()
            try:
                yield {"text": data.decode()}
            except UnicodeDecodeError:
                yield Unusable("undecodable", len(data))
        else:
            yield from _json_rows(piece, kind)
    except (UserError, GeneratorExit):
        raise
    except Exception as error:  # whatever a codec, pyarrow or a remote file system raises
        raise UserError(f"cannot read {piece.file}: {first_line(error)}; the same command continues") from None


def _kind(file: str) -> str:
    """parquet | arrow | text | json | gzip | zstandard (JSON lines under that), "" for none of these."""
    name = file.rsplit("/", 1)[-1].lower()
    stem, _, end = name.rpartition(".")
    if end in ("parquet", "arrow"):
        return end
    if name.endswith(JSON_SUFFIXES):
        return "json"
    if end in PACKED and stem.endswith(JSON_SUFFIXES):
        return PACKED[end]
    return "text" if name.endswith(TEXT_SUFFIXES) else ""


def _open(file: str) -> IO[bytes]:
    if "://" not in file:
        return open(file, "rb")
    import fsspec  # of the `data` extra, like pyarrow and zstandard below

    return fsspec.open(file, "rb").open()


@contextlib.contextmanager
def _parquet(file: str) -> Iterator[Any]:
    import pyarrow.parquet

    try:
        with _open(file) as opened, pyarrow.parquet.ParquetFile(opened) as parquet:
            yield parquet
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {file}: {first_line(error)}") from None


def _parquet_rows(piece: Slice, columns: Sequence[str]) -> Iterator[Row]:
    with _parquet(piece.file) as parquet:
        names = [name for name in parquet.schema_arrow.names if name in columns]
        if not names:
            raise missing_columns(piece.file, columns, parquet.schema_arrow.names)
        groups = range(piece.begin, parquet.num_row_groups if piece.end is None else piece.end)
        for batch in parquet.iter_batches(batch_size=256, row_groups=list(groups), columns=names):
            yield from batch.to_pylist()


def _arrow_rows(piece: Slice, columns: Sequence[str]) -> Iterator[Row]:
    import pyarrow

    with _open(piece.file) as file:
        try:
            batches: Any = pyarrow.ipc.open_stream(file)  # what `datasets` writes
        except pyarrow.ArrowInvalid:
            file.seek(0)
            reader = pyarrow.ipc.open_file(file)
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        for batch in batches:
            names = [name for name in batch.schema.names if name in columns]
            if not names:
                raise missing_columns(piece.file, columns, batch.schema.names)
            yield from batch.select(names).to_pylist()


def _json_rows(piece: Slice, kind: str) -> Iterator[Row | Unusable]:
    with _open(piece.file) as raw, _unpacked(raw, kind) as file:
        for line in _lines(file, piece):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except UnicodeDecodeError:
                yield Unusable("undecodable", len(line))
            except (ValueError, RecursionError):
                yield Unusable("malformed line", len(line))
            else:
                yield row if isinstance(row, dict) else Unusable("malformed line", len(line))


def _lines(file: IO[bytes], piece: Slice) -> Iterator[bytes]:
    """The lines that begin in the slice."""
    position = piece.begin
    if position:
        file.seek(position - 1)
        position += len(file.readline()) - 1
    if piece.end is None:
        yield from file
        return
    while position < piece.end and (line := file.readline()):
        position += len(line)
        yield line


@contextlib.contextmanager
def _unpacked(raw: IO[bytes], kind: str) -> Iterator[IO[bytes]]:
    if kind == "gzip":
        yield io.BufferedReader(gzip.GzipFile(fileobj=raw), 1 << 20)
    elif kind == "zstandard":
        yield io.BufferedReader(_Zstandard(raw), 1 << 20)
    else:
        yield raw


class _Zstandard(io.RawIOBase):
    """The content of zstandard frames. The library's own reader takes a file that was cut short for a whole one."""

    def __init__(self, raw: IO[bytes]) -> None:
        import zstandard

        self._raw, self._decompressor = raw, zstandard.ZstdDecompressor()
        self._frame: Any = None
        self._rest = b""  # compressed
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._ready:
            data = self._rest or self._raw.read(1 << 18)
            self._rest = b""
            if not data:
                if self._frame is not None:
                    raise EOFError("the file ends in the middle of a zstandard frame")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._rest, self._frame = self._frame.unused_data, None
        size = min(len(buffer), len(self._ready))
        buffer[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def missing_columns(file: str, wanted: Sequence[str], found: Sequence[str]) -> UserError:
    """The error for a file without the columns that a source names."""
    return UserError(f"{file} has no column {' or '.join(map(repr, wanted))}: it has {', '.join(found) or 'none'}")
