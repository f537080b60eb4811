"""From files to chosen documents: read, drop, split, sample, and spool as JSON lines for the tokenizer and encoder.

Every choice is made by hash, so it does not depend on the order of files, on other sources or on chance. A document
that is left out is counted under a reason.
"""

import hashlib
import heapq
import json
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO

from data_prep.config import SourceConfig
from data_prep.sources import KINDS, Document, Unusable
from mm_train.cli import UserError
from mm_train.files import publish, write_atomic

VERSION = 2  # raise it when the same input comes out as other documents
SPLITS = ("train", "val")


@dataclass
class Report:
    """What became of a source: kept documents and bytes per split, dropped ones per reason, as [documents, bytes]."""

    kept: dict[str, list[int]] = field(default_factory=lambda: {split: [0, 0] for split in SPLITS})
    dropped: dict[str, list[int]] = field(default_factory=dict)

    def drop(self, reason: str, num_bytes: int) -> None:
        count = self.dropped.setdefault(reason, [0, 0])
        count[0] += 1
        count[1] += num_bytes


def source_key(source: SourceConfig, validation_fraction: float) -> str:
    """Identifies the documents of a source: a hash of its configuration and of the content of its input files.

    Raises UserError when it has no input files.
    """
    files = KINDS[source.kind].files(source)
    if not files:
        raise UserError(f"no document source for kind {source.kind} with parts {source.parts}: no files found here")
    key = hashlib.sha256(json.dumps([VERSION, asdict(source), validation_fraction], sort_keys=True).encode())
    for file in files:
        with file.open("rb") as data:
            key.update(hashlib.file_digest(data, "sha256").digest())
    return key.hexdigest()


def collect(name: str, source: SourceConfig, validation_fraction: float, spool: Path) -> Report:
    """Write the documents of a source to SPOOL/train.jsonl and SPOOL/val.jsonl, unless that has been done.

    Raises UserError when no training document is left.
    """
    if spool.is_dir():
        return Report(**json.loads((spool / "report.json").read_bytes()))
    unfinished = spool.with_name(f"{spool.name}.{os.getpid()}.tmp")
    unfinished.mkdir(parents=True)
    report = Report()
    limits = {"train": source.max_bytes, "val": source.max_validation_bytes}
    with (unfinished / "train.jsonl").open("w") as train, (unfinished / "val.jsonl").open("w") as val:
        spools = {split: _Spool(file, limits[split], split, report) for split, file in (("train", train), ("val", val))}
        for document, digest in _usable(source, report):
            held_out = _fraction("split", document.key.encode() or digest) < validation_fraction
            spools["val" if held_out else "train"].offer(document, digest)
        for split in SPLITS:
            spools[split].close()
    if not report.kept["train"][0]:
        reasons = ", ".join(f"{reason}: {count[0]}" for reason, count in sorted(report.dropped.items())) or "none found"
        raise UserError(
            f"source {name} is empty: no document is left to train on (dropped {reasons}; "
            f"held out: {report.kept['val'][0]})"
        )
    write_atomic(unfinished / "report.json", json.dumps(asdict(report)).encode())
    publish(unfinished, spool)
    return report


def read_spool(file: Path) -> Iterator[Document]:
    """The documents that `collect` wrote."""
    with file.open() as lines:
        for line in lines:
            yield document_from_line(line)


def document_from_line(line: str) -> Document:
    """The document in one line of a spool."""
    content = json.loads(line)
    return Document(content["text"], tuple(content["messages"]))


def _usable(source: SourceConfig, report: Report) -> Iterator[tuple[Document, bytes]]:
    """Documents worth keeping, each with the digest of its content; the others go into the report."""
    kind = KINDS[source.kind]
    seen: set[bytes] = set()
    for item in kind.read(source, kind.files(source)):
        if isinstance(item, Unusable):
            report.drop(item.reason, item.num_bytes)
            continue
        content = json.dumps(item.messages) if item.messages else item.text
        digest = hashlib.blake2b(content.encode(), digest_size=16).digest()
        reason = ""
        if not item.messages and not item.text.strip():
            reason = "empty"
        elif item.messages and not any(message["role"] == "assistant" for message in item.messages):
            reason = "no answer"
        elif item.num_bytes < source.min_bytes:
            reason = "shorter than min_bytes"
        elif digest in seen:
            reason = "duplicate"
        if reason:
            report.drop(reason, item.num_bytes)
        else:
            seen.add(digest)
            yield item, digest


def _fraction(purpose: str, data: bytes) -> float:
    """A number in [0, 1) that is a fixed, evenly spread function of `data`, independent between purposes."""
    digest = hashlib.blake2b(data, digest_size=8, person=purpose.encode()).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Spool:
    """Writes documents of one split; with a limit, in hash order, passing over those that no longer fit into it.

    Without a limit documents pass through in reading order. With one, candidates are the documents with the lowest
    hashes that together are no more than twice the limit: this bounds memory, and what is written depends neither on
    the order of reading nor on one large document that happens to come first.
    """

    def __init__(self, file: IO[str], max_bytes: int | None, split: str, report: Report):
        self._file, self._max_bytes, self._split, self._report = file, max_bytes, split, report
        self._candidates: list[tuple[float, bytes, Document]] = []  # a heap, highest hash first
        self._held = 0  # bytes of candidates
        self._bound = 1.0  # documents from this hash on have been refused

    def offer(self, document: Document, digest: bytes) -> None:
        if self._max_bytes is None:
            self._write(document)
            return
        rank = _fraction("sample", digest)
        if rank >= self._bound or document.num_bytes > self._max_bytes:
            self._refuse(document)
            return
        heapq.heappush(self._candidates, (-rank, digest, document))  # digests differ: documents are never compared
        self._held += document.num_bytes
        while self._held > 2 * self._max_bytes:
            highest, _, refused = heapq.heappop(self._candidates)
            self._held -= refused.num_bytes
            self._bound = -highest
            self._refuse(refused)

    def close(self) -> None:
        for _, _, document in sorted(self._candidates, reverse=True):
            if self._report.kept[self._split][1] + document.num_bytes <= (self._max_bytes or 0):
                self._write(document)
            else:
                self._refuse(document)
        self._file.flush()
        os.fsync(self._file.fileno())

    def _refuse(self, document: Document) -> None:
        self._report.drop(f"over the {self._split} limit", document.num_bytes)

    def _write(self, document: Document) -> None:
        self._file.write(json.dumps({"text": document.text, "messages": document.messages}) + "\n")
        self._report.kept[self._split][0] += 1
        self._report.kept[self._split][1] += document.num_bytes
