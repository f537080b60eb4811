"""Where documents come from: the input of a source, divided into parts that processes can work on by themselves."""

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from data_prep import formats, hub, machine
from data_prep.config import SourceConfig
from data_prep.documents import Document, Unusable
from data_prep.formats import Slice
from data_prep.rows import columns, to_document
from mm_train.cli import UserError

HASHED_BYTES = 1 << 30  # input up to this is told apart by its content, more by name, size and time of change
PATIENCE = 1000  # rows without the column before its absence is an error rather than bad luck

MACHINE = {  # documents made from the Python installation; each kind looks at all its files together
    "stdlib_code": (machine.stdlib_files, machine.read_stdlib_code),
    "machine_docs": (machine.docs_files, machine.read_docs),
    "docstring_chat": (machine.stdlib_files, machine.read_docstring_chat),
}


@dataclass(frozen=True)
class Part:
    """A share of a source's input, read by one process from beginning to end."""

    slices: tuple[Slice, ...]

    @property
    def size(self) -> int:
        """Bytes of the input files."""
        return sum(piece.size for piece in self.slices)


@dataclass(frozen=True)
class Input:
    """All that a source reads. `identity` changes when any of it does; `commit` is that of the hub, where known."""

    parts: tuple[Part, ...]
    identity: str
    commit: str = ""


def find_input(name: str, source: SourceConfig, part_bytes: int) -> Input:
    """The input of a source in parts of about `part_bytes`; how it is cut depends on the files alone.

    Raises UserError when there is none, or a file that cannot be read.
    """
    commit = ""
    if source.kind in MACHINE:
        paths = MACHINE[source.kind][0](source)
        if not paths:
            raise UserError(f"no document source for kind {source.kind} with parts {source.parts}: no files found here")
        files = [(str(path), path.stat().st_size) for path in paths]
        return Input((Part(tuple(Slice(file, size) for file, size in files)),), _identity(files, content=True))
    if source.kind == "hub":
        files, commit = hub.find_files(source)
    else:
        files = [(file, os.stat(file).st_size) for file in _globbed(source)]
    for file, _ in files:
        if not formats.is_known(file):
            raise UserError(
                f"cannot read {file}: a corpus file ends in {', '.join(formats.SUFFIXES)}; narrow the names"
            )
    if not any(size for _, size in files):
        raise UserError(f"source {name} is empty: its {len(files)} file(s) have no content")
    identity = _identity(files, content=not commit and sum(size for _, size in files) <= HASHED_BYTES)
    return Input(tuple(_parts(files, part_bytes)), hashlib.sha256((commit + identity).encode()).hexdigest(), commit)


def read(source: SourceConfig, part: Part) -> Iterator[Document | Unusable]:
    """The documents of a part, in order. Raises UserError for a damaged file or one without the column asked for."""
    if source.kind in MACHINE:
        yield from MACHINE[source.kind][1](source, [Path(piece.file) for piece in part.slices])
        return
    for piece in part.slices:
        if "://" in piece.file and not source.streaming:
            piece = replace(piece, file=hub.fetch(piece.file))
        yield from _documents(source, piece)


def _documents(source: SourceConfig, piece: Slice) -> Iterator[Document | Unusable]:
    absent, present = 0, False
    for row in formats.rows(piece, columns(source)):
        document = row if isinstance(row, Unusable) else to_document(row, source)
        if isinstance(document, Unusable) and document.reason == "no column" and not present:
            absent += 1
            assert isinstance(row, dict)
            found = list(row)
            if absent == PATIENCE:
                break
        present = present or isinstance(document, Document)
        yield document
    if absent and not present:
        raise formats.missing_columns(piece.file, columns(source), found)


def _globbed(source: SourceConfig) -> list[str]:
    """The files that the globs in `paths` match, each once. Raises UserError for one that matches nothing."""
    files: set[str] = set()
    for pattern in source.paths:
        matches = [match for match in glob.glob(pattern, recursive=True) if os.path.isfile(match)]
        if not matches:
            raise UserError(f"no document source at {pattern}: no file matches")
        files.update(matches)
    return sorted(files)


def _parts(files: list[tuple[str, int]], part_bytes: int) -> Iterator[Part]:
    slices = [piece for file, size in files for piece in formats.cut(file, size, part_bytes)]
    ends = itertools.accumulate(piece.size for piece in slices)
    by_part = itertools.groupby(zip(slices, ends, strict=True), lambda item: max(0, item[1] - 1) // part_bytes)
    for _, group in by_part:
        yield Part(tuple(piece for piece, _ in group))


def _identity(files: list[tuple[str, int]], content: bool) -> str:
    """A hash that stands for the files: of their content, or of what the file system and the hub say of them."""
    whole = hashlib.sha256()
    for file, size in files:
        if content:
            with open(file, "rb") as data:
                whole.update(hashlib.file_digest(data, "sha256").digest())
        else:
            changed = 0 if "://" in file else os.stat(file).st_mtime_ns
            whole.update(f"{file}\0{size}\0{changed}\0".encode())
    return whole.hexdigest()
