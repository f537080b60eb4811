"""Runs of words by hash, and where a text shares one with an index. Everything is vectorised over batches of texts.

Words are runs of letters and digits in lower case: case, punctuation and white space make no difference. A run of n
words is a 64-bit hash: a polynomial over word hashes, which are polynomials over bytes, read off running sums.
"""

import functools
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SIGNS = re.compile(
    "[\u0080-\u00a9\u00ab-\u00b4\u00b6-\u00b9\u00bb-\u00bf\u00d7\u00f7\u2000-\u206f\u2190-\u2bff\u3000-\u3004\u3008-\u303f\uff00-\uff0f\uff1a-\uff20]"
)
BATCH_BYTES = 1 << 18  # of text hashed at a time
OVERLAP = 4000  # characters that two pieces of a long text share, more than any run of words that is looked for
BASES = (0x9E3779B97F4A7C15 | 1, 0xD6E8FEB86659FD93)  # of the polynomials over bytes and over words: odd, so invertible
FILTER_BITS = 1 << 27

WORD_BYTE = np.zeros(256, dtype=np.bool_)
WORD_BYTE[[*b"0123456789abcdefghijklmnopqrstuvwxyz", *range(0x80, 0x100)]] = True


@dataclass(frozen=True)
class Hit:
    """Words of text number `text` that are also in the index, as found there, and the owner of the run."""

    text: int
    words: str
    owner: int


@dataclass(frozen=True)
class Words:
    """The words of several texts in one buffer: hash, first and last byte, and text of each."""

    data: bytes
    hashes: np.ndarray  # uint64
    begins: np.ndarray
    ends: np.ndarray
    texts: np.ndarray

    def runs(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """(hashes uint64, indices of their first words) of all runs of `length` words within a text."""
        count = len(self.hashes) - length + 1
        if count <= 0:
            return np.zeros(0, dtype=np.uint64), np.zeros(0, dtype=np.int64)
        powers, inverses = _powers(1, len(self.hashes))
        sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(self.hashes * powers)])
        hashes = _mix((sums[length:] - sums[:-length]) * inverses[:count])
        inside = np.flatnonzero(self.texts[:count] == self.texts[length - 1 :])
        return hashes[inside], inside


def find_words(texts: Sequence[str]) -> Words:
    """The words of `texts`, numbered from 0."""
    cleaned = [text.lower() if text.isascii() else SIGNS.sub(" ", text.lower()) for text in texts]
    encoded = [text.encode() for text in cleaned]
    data = b" ".join(encoded)
    array = np.frombuffer(data, dtype=np.uint8)
    inside = np.zeros(len(array) + 2, dtype=np.bool_)
    inside[1:-1] = WORD_BYTE[array]
    begins, ends = np.flatnonzero(inside[1:] != inside[:-1]).reshape(-1, 2).T
    powers, inverses = _powers(0, len(array))
    sums = np.concatenate([np.zeros(1, dtype=np.uint64), np.cumsum(_byte_values()[array] * powers)])
    hashes = _mix((sums[ends] - sums[begins]) * inverses[begins])
    starts = np.cumsum([0, *(len(text) + 1 for text in encoded)])
    return Words(data, hashes, begins, ends, np.searchsorted(starts, begins, side="right") - 1)


class Index:
    """Runs of words of one length, with an owner each."""

    def __init__(self, length: int, hashes: np.ndarray, owners: np.ndarray) -> None:
        """`hashes` uint64, sorted and unique; `owners` uint32, one for each."""
        self.length, self.hashes, self.owners = length, hashes, owners
        self._maybe = np.zeros(FILTER_BITS // 8, dtype=np.uint8)  # most words are ruled out by one look at it
        bits = hashes & np.uint64(FILTER_BITS - 1)
        np.bitwise_or.at(self._maybe, bits >> np.uint64(3), _bit(bits))

    def find(self, words: Words) -> Iterator[Hit]:
        """The first run of each text that is in the index."""
        hashes, first = words.runs(self.length)
        bits = hashes & np.uint64(FILTER_BITS - 1)
        chosen = np.flatnonzero(self._maybe[bits >> np.uint64(3)] & _bit(bits))
        places = np.searchsorted(self.hashes, hashes[chosen])
        found = places < len(self.hashes)
        found[found] = self.hashes[places[found]] == hashes[chosen[found]]
        seen: set[int] = set()
        for at, place in zip(first[chosen[found]], places[found], strict=True):
            text = int(words.texts[at])
            if text not in seen:
                seen.add(text)
                run = range(at, at + self.length)
                spelt = b" ".join(words.data[words.begins[i] : words.ends[i]] for i in run)
                yield Hit(text, spelt.decode(errors="replace"), int(self.owners[place]))

    def save(self, folder: Path) -> None:
        """Write runs-LENGTH.npy and owners-LENGTH.npy."""
        np.save(folder / f"runs-{self.length}.npy", self.hashes)
        np.save(folder / f"owners-{self.length}.npy", self.owners)

    @classmethod
    def load(cls, folder: Path, length: int) -> "Index":
        """What `save` wrote."""
        return cls(length, np.load(folder / f"runs-{length}.npy"), np.load(folder / f"owners-{length}.npy"))


def search(indexes: Sequence[Index], texts: Sequence[str]) -> dict[int, Hit]:
    """Text number -> a run that it shares with the first index that knows one."""
    hits: dict[int, Hit] = {}
    for numbers, batch in _batches(texts):
        words = find_words(batch)
        for index in indexes:
            for hit in index.find(words):
                number = numbers[hit.text]
                hits.setdefault(number, Hit(number, hit.words, hit.owner))
    return hits


def _batches(texts: Sequence[str]) -> Iterator[tuple[list[int], list[str]]]:
    """(numbers, texts) of about BATCH_BYTES characters; long texts in overlapping pieces."""
    numbers: list[int] = []
    batch: list[str] = []
    size = 0
    for number, text in enumerate(texts):
        for begin in range(0, max(1, len(text)), BATCH_BYTES):
            piece = text[max(0, begin - OVERLAP) : begin + BATCH_BYTES]
            numbers.append(number)
            batch.append(piece)
            size += len(piece)
            if size >= BATCH_BYTES:
                yield numbers, batch
                numbers, batch, size = [], [], 0
    if batch:
        yield numbers, batch


def _bit(bits: np.ndarray) -> np.ndarray:
    return np.left_shift(np.uint8(1), (bits & np.uint64(7)).astype(np.uint8))


def _powers(which: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Powers of a base and of its inverse modulo 2 ** 64, from the 0th."""
    powers, inverses = _power_table(which, 1 << max(16, (count - 1).bit_length()))
    return powers[:count], inverses[:count]


@functools.lru_cache(maxsize=8)
def _power_table(which: int, count: int) -> tuple[np.ndarray, np.ndarray]:
    base = BASES[which]
    tables = []
    for factor in (base, pow(base, -1, 1 << 64)):
        steps = np.full(count, factor, dtype=np.uint64)
        steps[0] = 1
        tables.append(np.cumprod(steps))
    return tables[0], tables[1]


@functools.lru_cache(maxsize=1)
def _byte_values() -> np.ndarray:
    return _mix(np.arange(1, 257, dtype=np.uint64))


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
