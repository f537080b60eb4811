"""The chosen documents of a part as shards: rendered, tokenised, packed and written, one shard after the other.

Every finished shard is a small data set of its own, whose manifest says where the next one begins. Work that was cut
short goes on there, and the shards come out the same. `join` in data_prep/publish.py makes one data set of them.
"""

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.collect import Spool
from data_prep.documents import Document
from data_prep.fast_tokenizer import Engine
from data_prep.pack import best_fit
from data_prep.render import Frame, Piece, render, trained_on
from data_prep.workers import advance
from mm_train.files import write_atomic
from mm_train.shards import ShardReader, ShardWriter

BATCH_BYTES = 1 << 20  # of text tokenised together
GROUP_DOCUMENTS = 1 << 16  # that are packed together: bounds memory, and is far more than good packing needs
GROUP_TOKENS = 1 << 26  # likewise


@dataclass(frozen=True)
class Chosen:
    """Documents of one spool, by number, in the order in which they are written."""

    spool: Path
    numbers: np.ndarray
    num_bytes: int


@dataclass(frozen=True)
class Job:
    """One piece of work: some documents of a source as the shards of FOLDER.

    `number` is that of the part in its source and split, None when it is the only one.
    """

    folder: Path
    source: str
    split: str
    chosen: Sequence[Chosen]
    engine: Engine
    frame: Frame
    row_length: int | None
    shard_tokens: int
    number: int | None
    facts: dict[str, Any]  # of the manifest, see ShardWriter

    @property
    def num_bytes(self) -> int:
        """Bytes of text."""
        return sum(some.num_bytes for some in self.chosen)


@dataclass(frozen=True)
class Progress:
    """How far a job is: finished shards, the document with which the next one begins, and what became of the rest.

    In packed sources a shard ends within a group of documents: then `document` is the first of the group and `rows`
    says how many of its rows are written. `cut` texts and `dropped` conversations ([documents, bytes]) were longer than
    a row.
    """

    shards: int = 0
    document: int = 0
    rows: int = 0
    cut: int = 0
    dropped: list[int] = field(default_factory=lambda: [0, 0])


def encode(job: Job) -> None:
    """Write what is missing of a job's shards, then FOLDER/done.json with its Progress."""
    job.folder.mkdir(parents=True, exist_ok=True)
    progress = find_progress(job)
    output = _Output(job, progress)
    source = _encoded(job, progress.document)
    if job.row_length is None:
        for document, (pieces, num_bytes) in enumerate(source, progress.document + 1):
            output.add(pieces, num_bytes)
            output.end(Progress(0, document))
        last = Progress()
    else:
        last = _write_rows(job, source, progress, output)
    output.end(last, final=True)
    write_atomic(job.folder / "done.json", json.dumps(asdict(replace(last, shards=output.shards))).encode())


def find_progress(job: Job) -> Progress:
    """What the finished shards of a job say; of unfinished ones nothing is left."""
    progress = Progress()
    while (folder := shard_folder(job, progress.shards) / job.source / job.split / "manifest.json").is_file():
        found = ShardReader(folder.parent).manifest.extra
        progress = Progress(**{**found, "shards": progress.shards + 1})
    return progress


def shard_folder(job: Job, shard: int) -> Path:
    """Where shard number `shard` of a job is written."""
    return job.folder / f"{shard:05d}"


class _Output:
    """The shards of a job, closed where they are full."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self._job, self.shards = job, progress.shards
        self._writer: ShardWriter | None = None
        self._filled = 0  # tokens of the open shard

    def add(self, pieces: Sequence[Piece], num_bytes: int) -> None:
        """Add one document, or those of a row one by one."""
        if self._writer is None:
            number = f"{self.shards:05d}" if self._job.number is None else f"{self._job.number:05d}-{self.shards:05d}"
            first = self._job.number is None and not self.shards
            self._writer = ShardWriter(
                shard_folder(self._job, self.shards),
                self._job.source,
                self._job.split,
                shard_tokens=1 << 62,  # it is closed from here
                number=None if first else number,
                **self._job.facts,
            )
            self._filled = 0
        for ids, mask in pieces:
            if mask is None and self._job.facts["has_mask"]:  # a text among conversations
                mask = trained_on(ids)
            self._writer.add(ids, mask, num_bytes)
            self._filled += len(ids)
            num_bytes = 0

    def end_row(self) -> None:
        """Fill the row."""
        if self._writer is not None and self._job.row_length:
            self._writer.end_row(self._job.frame.pad_id)
            self._filled += -self._filled % self._job.row_length

    def end(self, progress: Progress, final: bool = False) -> None:
        """Close the shard if it is full, or if it is the last; `progress` is where the next one would begin."""
        if self._writer is not None and (final or self._filled >= self._job.shard_tokens):
            self._writer.close(asdict(progress))
            self._writer = None
            self.shards += 1


def _write_rows(job: Job, source: Iterator[tuple[list[Piece], int]], begun: Progress, output: _Output) -> Progress:
    """Documents fitted into rows, a group at a time. Returns what became of those that are longer than a row."""
    assert job.row_length is not None
    progress = replace(begun, shards=0)
    for count, group in _groups(source):
        before, cut, dropped = progress, progress.cut, list(progress.dropped)
        fitting: list[tuple[Piece, int]] = []
        for pieces, num_bytes in group:
            cut += len(pieces) > 1
            if len(pieces[0][0]) > job.row_length:
                dropped = [dropped[0] + 1, dropped[1] + num_bytes]
            else:
                fitting += [(piece, 0 if i else num_bytes) for i, piece in enumerate(pieces)]
        rows = best_fit([len(ids) for (ids, _), _ in fitting], job.row_length)
        for number, row in enumerate(rows[before.rows :], before.rows + 1):
            for index in row:
                output.add([fitting[index][0]], fitting[index][1])
            output.end_row()
            output.end(replace(before, rows=number))
        progress = Progress(0, before.document + count, 0, cut, dropped)
    return progress


def _groups(source: Iterator[tuple[list[Piece], int]]) -> Iterator[tuple[int, list[tuple[list[Piece], int]]]]:
    """Documents that are packed together, and how many they are."""
    while first := list(itertools.islice(source, 1)):
        group, tokens = first, 0
        for document in itertools.islice(source, GROUP_DOCUMENTS - 1):
            group.append(document)
            tokens += sum(len(ids) for ids, _ in document[0])
            if tokens >= GROUP_TOKENS:
                break
        yield len(group), group


def _encoded(job: Job, begin: int) -> Iterator[tuple[list[Piece], int]]:
    """(pieces, bytes of text) of every document from number `begin` on."""
    encode_texts = job.engine.load()
    for documents in _batches(job.chosen, begin):
        rendered = render(documents, job.frame, encode_texts, job.row_length)
        sizes = [document.num_bytes for document in documents]
        advance(sum(sizes), sum(len(ids) for pieces in rendered for ids, _ in pieces))
        yield from zip(rendered, sizes, strict=True)


def _batches(chosen: Sequence[Chosen], begin: int) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for some in chosen:
        numbers = some.numbers[begin:]
        begin = max(0, begin - len(some.numbers))
        if not len(numbers):
            continue
        spool = Spool(some.spool)
        for number in numbers.tolist():
            batch.append(spool[number])
            size += batch[-1].num_bytes
            if size >= BATCH_BYTES:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch
