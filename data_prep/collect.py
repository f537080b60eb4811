"""Reads a part of a source: repaired, filtered, compared with the benchmarks, and spooled for what comes after.

A document that is left out is counted under a reason. What is kept goes into documents.bin, texts as they are and
conversations as JSON, with a row in index.npy; duplicates and held-out documents are told apart later, from the indexes
of all parts.
"""

import hashlib
import json
import mmap
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.benchmarks import Benchmarks
from data_prep.config import SourceConfig
from data_prep.documents import Document, Unusable
from data_prep.filters import load_filters
from data_prep.minhash import signatures
from data_prep.normalise import normalise
from data_prep.sources import Part, read
from data_prep.workers import advance
from mm_train.files import publish, sync, write_atomic

VERSION = 4  # raise it when the same input comes out as other documents
BATCH_BYTES = 1 << 20  # of text looked at together
NUM_EXAMPLES = 3  # of dropped documents, for each reason and part
EXAMPLE_LENGTH = 240  # characters

INDEX = np.dtype(
    [
        ("digest", "<u8", 2),  # of the content
        ("rank", "<f8"),  # in [0, 1), by hash: where documents have to be left out, the highest go first
        ("share", "<f8"),  # in [0, 1), by hash: below the validation fraction, a document is held out
        ("offset", "<u8"),  # of its place in documents.bin
        ("size", "<u8"),  # of that place
        ("bytes", "<u8"),  # of its text
        ("chat", "?"),  # a conversation
    ]
)


@dataclass
class Report:
    """What was left out of a source and why: [documents, bytes] and the beginnings of some, by reason."""

    dropped: dict[str, list[int]] = field(default_factory=dict)
    examples: dict[str, list[str]] = field(default_factory=dict)
    contaminated: list[dict[str, Any]] = field(default_factory=list)  # benchmark, item, words, beginning of the text

    def drop(self, reason: str, num_bytes: int, text: str = "", documents: int = 1) -> None:
        """Count documents that are left out."""
        count = self.dropped.setdefault(reason, [0, 0])
        count[0] += documents
        count[1] += num_bytes
        examples = self.examples.setdefault(reason, [])
        if text.strip() and len(examples) < NUM_EXAMPLES:
            examples.append(text[:EXAMPLE_LENGTH])

    def add(self, other: "Report") -> None:
        """Take in what was left out of another part."""
        for reason, (documents, num_bytes) in other.dropped.items():
            self.drop(reason, num_bytes, documents=documents)
            self.examples[reason] = (self.examples[reason] + other.examples.get(reason, []))[:NUM_EXAMPLES]
        self.contaminated += other.contaminated


def collect(source: SourceConfig, part: Part, benchmarks: Path | None, folder: Path) -> None:
    """Write what is kept of a part into `folder`, which appears whole or not at all."""
    unfinished = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    report = Report()
    index, sketches = [], []
    offset = 0
    with (unfinished / "documents.bin").open("wb") as spool:
        for batch in _batches(_usable(source, part, report)):
            kept = _clean(batch, source, benchmarks, report)
            if source.dedup == "minhash":
                sketches.append(signatures(["\n".join(document.parts) for document in kept]))
            for document in kept:
                data = to_bytes(document)
                spool.write(data)
                index.append(_entry(document, data, offset))
                offset += len(data)
            advance(sum(document.num_bytes for document in batch))
        spool.flush()
        os.fsync(spool.fileno())
    np.save(unfinished / "index.npy", np.array(index, dtype=INDEX))
    if source.dedup == "minhash":
        np.save(unfinished / "minhash.npy", np.concatenate([*sketches, signatures([])]))
    write_atomic(unfinished / "report.json", json.dumps(asdict(report)).encode())
    for file in unfinished.iterdir():
        sync(file)
    publish(unfinished, folder)


def read_report(folder: Path) -> Report:
    """What `collect` left out of a part."""
    return Report(**json.loads((folder / "report.json").read_bytes()))


class Spool:
    """The documents that `collect` kept of a part, by number."""

    def __init__(self, folder: Path) -> None:
        self.index: np.ndarray = np.load(folder / "index.npy")
        with (folder / "documents.bin").open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            self._data = mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) if size else b""

    def __getitem__(self, number: int) -> Document:
        offset, size = int(self.index["offset"][number]), int(self.index["size"][number])
        return from_bytes(self._data[offset : offset + size], bool(self.index["chat"][number]))


def to_bytes(document: Document) -> bytes:
    """A document as it lies in a spool."""
    return json.dumps(document.messages).encode() if document.messages else document.text.encode()


def from_bytes(data: bytes, chat: bool) -> Document:
    """The document that `to_bytes` made `data` of."""
    return Document(messages=tuple(json.loads(data))) if chat else Document(data.decode())


def _usable(source: SourceConfig, part: Part, report: Report) -> Iterator[Document]:
    """Documents that are worth keeping by themselves, repaired; the others go into the report."""
    filters = load_filters(source.filters)
    for item in read(source, part):
        if isinstance(item, Unusable):
            report.drop(item.reason, item.num_bytes)
            continue
        document, reason = normalise(item, source.normalise), ""
        if not document.messages and not document.text.strip():
            reason = "empty"
        elif document.messages and not any(message["role"] == "assistant" for message in document.messages):
            reason = "no answer"
        elif document.num_bytes < source.min_bytes:
            reason = "shorter than min_bytes"
        for apply in filters if not reason else ():
            document, reason = apply(document)
            if reason:
                break
        if reason:
            report.drop(reason, document.num_bytes, _beginning(document))
        else:
            yield document


def _clean(batch: list[Document], source: SourceConfig, benchmarks: Path | None, report: Report) -> list[Document]:
    """The documents of a batch that share nothing with a benchmark."""
    if benchmarks is None or not source.decontaminate:
        return batch
    found = _open(benchmarks).search(["\n".join(document.parts) for document in batch])
    for number, contamination in sorted(found.items()):
        document = batch[number]
        report.drop("in a benchmark", document.num_bytes, _beginning(document))
        report.contaminated.append({**asdict(contamination), "text": _beginning(document)})
    return [document for number, document in enumerate(batch) if number not in found]


def _entry(document: Document, data: bytes, offset: int) -> tuple[Any, ...]:
    digest = hashlib.blake2b(data, digest_size=16).digest()
    share = _fraction("split", document.key.encode() or digest)
    halves = (int.from_bytes(digest[:8], "big"), int.from_bytes(digest[8:], "big"))
    rank = _fraction("sample", digest)
    return halves, rank, share, offset, len(data), document.num_bytes, bool(document.messages)


def _fraction(purpose: str, data: bytes) -> float:
    """A number in [0, 1) that is a fixed, evenly spread function of `data`, independent between purposes."""
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


def _batches(documents: Iterator[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _beginning(document: Document) -> str:
    return document.parts[0][:EXAMPLE_LENGTH]


@lru_cache(maxsize=1)
def _open(folder: Path) -> Benchmarks:
    """The benchmarks of a worker process, loaded once."""
    return Benchmarks(folder)
