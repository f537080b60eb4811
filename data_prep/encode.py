"""Spooled documents to shards: rendering and tokenising on several processes, packing and writing in order."""

import collections
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from data_prep.collect import document_from_line
from data_prep.pack import best_fit
from data_prep.render import render
from mm_train.shards import ShardWriter
from mm_train.tokenizer import Tokenizer, load_tokenizer

CHUNK_BYTES = 1 << 18  # of spool handed to a process at a time
AHEAD = 256  # chunks handed out before the first is needed back: keeps processes busy and memory bounded
PACK_GROUP = 1 << 16  # documents that are packed together: bounds memory, and is far more than good packing needs


@dataclass(frozen=True)
class TokenizerFile:
    """Where worker processes find the tokenizer, and which one it is."""

    folder: Path
    sha256: str


@dataclass
class Encoded:
    """One document as tokens: a list of (ids uint32, mask bool), more than one when a text was cut for its row."""

    pieces: list[tuple[np.ndarray, np.ndarray]]
    num_bytes: int


@dataclass
class Fit:
    """What packing did to documents longer than a row: texts cut into rows, conversations dropped, as counts."""

    cut: int = 0
    dropped: list[int] = field(default_factory=lambda: [0, 0])  # documents, bytes


def encode_spool(
    file: Path, tokenizer: TokenizerFile, row_length: int | None, pool: Executor, progress: Callable[[int], object]
) -> Iterator[Encoded]:
    """Yield the encoded documents of a spool in its order; `progress` is told how many bytes of it are done."""
    pending: collections.deque[tuple[Future[list[Encoded]], int]] = collections.deque()

    def finish() -> list[Encoded]:
        future, size = pending.popleft()
        encoded = future.result()
        progress(size)
        return encoded

    for lines in _chunks(file):
        pending.append((pool.submit(_encode, lines, tokenizer, row_length), sum(map(len, lines))))
        if len(pending) > AHEAD:
            yield from finish()
    while pending:
        yield from finish()


def write_stream(documents: Iterable[Encoded], writer: ShardWriter) -> None:
    """One document after the other; every token is trained on."""
    for document in documents:
        for ids, _ in document.pieces:
            writer.add(ids, num_bytes=document.num_bytes)


def write_packed(documents: Iterable[Encoded], writer: ShardWriter, row_length: int, pad_id: int) -> Fit:
    """Whole documents fitted into rows. Returns what became of those that are too long."""
    fit = Fit()
    fitting = _fitting(documents, row_length, fit)
    while group := list(itertools.islice(fitting, PACK_GROUP)):
        for row in best_fit([len(ids) for ids, _, _ in group], row_length):
            for index in row:
                writer.add(*group[index])
            writer.end_row(pad_id)
    return fit


def _fitting(documents: Iterable[Encoded], row_length: int, fit: Fit) -> Iterator[tuple[np.ndarray, np.ndarray, int]]:
    for document in documents:
        fit.cut += len(document.pieces) > 1
        if len(document.pieces[0][0]) > row_length:
            fit.dropped[0] += 1
            fit.dropped[1] += document.num_bytes
            continue
        for i, (ids, mask) in enumerate(document.pieces):
            yield ids, mask, 0 if i else document.num_bytes


def _chunks(file: Path) -> Iterator[list[str]]:
    with file.open() as lines:
        while chunk := lines.readlines(CHUNK_BYTES):
            yield chunk


def _encode(lines: list[str], tokenizer: TokenizerFile, row_length: int | None) -> list[Encoded]:
    loaded = _load(tokenizer)
    encoded = []
    for line in lines:
        document = document_from_line(line)
        pieces = [
            (np.array(ids, dtype=np.uint32), np.array(mask, dtype=np.bool_))
            for ids, mask in render(document, loaded, row_length)
        ]
        encoded.append(Encoded(pieces, document.num_bytes))
    return encoded


@functools.lru_cache(maxsize=1)
def _load(tokenizer: TokenizerFile) -> Tokenizer:
    """The tokenizer of a worker process, loaded once."""
    return load_tokenizer(tokenizer.folder)
