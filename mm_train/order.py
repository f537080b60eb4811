"""Which window of which source is sample k: a pure function of (seed, mixture, k). Torch-free.

Nothing is iterated and nothing is stored: a run that consumed n samples goes on at sample n, on any number of ranks.
Samples come in blocks of BLOCK, each with the exact share of every source, mixed by a keyed permutation. A source's
own count of uses runs through its windows; each time it has been through all of them (an epoch), another keyed
permutation orders them anew.

A source's uses are counted from the start of the run, so a mixture can follow another one: `start` is the sample from
which it holds, `used` how often each source had been used up to there.
"""

import functools
import hashlib
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from mm_train.cli import UserError

BLOCK = 1000  # samples in which every source has its exact share (Loader.identity says so in a key)
ROUNDS = 4  # of the Feistel network
CHUNK = 16  # blocks computed at a time: their arrays stay in the processor's cache
CACHED = 4  # chunks that are kept


class Sample(NamedTuple):
    source: str
    epoch: int
    window: int


class Samples(NamedTuple):
    """Many of them, as int64 arrays of one length; `source` is an index into Mixture.names."""

    source: np.ndarray
    epoch: np.ndarray
    window: np.ndarray


def quotas(weights: Mapping[str, float], block: int = BLOCK) -> dict[str, int]:
    """Samples of each source in a block, by largest remainder; they add up to `block`."""
    total = sum(weights.values())
    exact = {name: weight / total * block for name, weight in weights.items()}
    counts = {name: int(share) for name, share in exact.items()}
    by_remainder = sorted(exact, key=lambda name: (counts[name] - exact[name], name))
    for name in by_remainder[: block - sum(counts.values())]:
        counts[name] += 1
    return counts


class Mixture:
    """Sample number k -> (source, epoch, window). `names` are the sources, sorted."""

    def __init__(
        self,
        weights: Mapping[str, float],
        num_windows: Mapping[str, int],
        seed: int,
        start: int = 0,
        used: Mapping[str, int] | None = None,
    ) -> None:
        """`num_windows` says how many windows each source has (at least one).

        Raises UserError for a weight too small to be kept.
        """
        # Sorted: the order of keys in a config must not change the order of samples.
        self.quotas = {name: count for name, count in sorted(quotas(weights).items()) if count}
        for name, weight in weights.items():
            if weight and name not in self.quotas:
                raise UserError(
                    f"data.mixture.{name} ({weight}) is below one sample in {BLOCK}: raise it or leave it out"
                )
        self.names = list(self.quotas)
        self.num_windows = {name: num_windows[name] for name in self.names}
        self.seed, self.start = seed, start
        self.used = {name: (used or {}).get(name, 0) for name in self.names}
        counts = np.array(list(self.quotas.values()))
        self._owner = np.repeat(np.arange(len(self.names)), counts)  # of each slot of a block before it is mixed
        self._first = np.cumsum(counts) - counts
        self._quota, self._used = counts, np.array(list(self.used.values()))
        self._windows = np.array(list(self.num_windows.values()))
        self._chunk = functools.lru_cache(CACHED)(self._compute)  # thread-safe

    def __getitem__(self, k: int) -> Sample:
        source, epoch, window = (int(values[0]) for values in self.samples(k, k + 1))
        return Sample(self.names[source], epoch, window)

    def samples(self, first: int, stop: int) -> Samples:
        """Samples [first, stop). Raises IndexError for those before `start`."""
        if first < self.start:
            raise IndexError(f"sample {first} is before sample {self.start}, with which this mixture begins")
        first, stop, size = first - self.start, stop - self.start, CHUNK * BLOCK
        chunks = [
            Samples(*(a[max(0, first - c * size) : max(0, stop - c * size)] for a in self._chunk(c)))
            for c in range(first // size, max(first // size + 1, -(-stop // size)))
        ]
        return chunks[0] if len(chunks) == 1 else Samples(*map(np.concatenate, zip(*chunks, strict=True)))

    def uses(self, k: int) -> dict[str, int]:
        """How often each source counts as used when another mixture takes over at sample k.

        The block that k lies in counts as used up, so nothing is read twice; what is left of it is passed over.
        """
        blocks = -(-(k - self.start) // BLOCK)
        return {name: self.used[name] + blocks * quota for name, quota in self.quotas.items()}

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source's windows have been read after `samples` samples of the run."""
        blocks = (samples - self.start) / BLOCK
        return {name: (self.used[name] + blocks * self.quotas[name]) / self.num_windows[name] for name in self.names}

    def _compute(self, chunk: int) -> Samples:
        """CHUNK blocks of samples."""
        blocks = np.arange(chunk * CHUNK, (chunk + 1) * CHUNK)
        keys = round_keys([self._key("block", block) for block in blocks.tolist()])
        index = np.tile(np.arange(BLOCK), CHUNK)
        slot = feistel(index, np.full_like(index, BLOCK), np.repeat(keys, BLOCK, axis=1))
        source = self._owner[slot]
        use = (self._used - self._first)[source] + np.repeat(blocks, BLOCK) * self._quota[source] + slot
        windows = self._windows[source]
        epoch, row = np.divmod(use, windows)
        # The keys of all epochs that occur in the chunk, source after source.
        lowest = (self._used + blocks[0] * self._quota) // self._windows
        highest = (self._used + (blocks[-1] + 1) * self._quota - 1) // self._windows
        numbers = [range(low, high + 1) for low, high in zip(lowest.tolist(), highest.tolist(), strict=True)]
        pairs = zip(self.names, numbers, strict=True)
        keys = round_keys([self._key(name, number) for name, epochs in pairs for number in epochs])
        place = np.cumsum([0, *map(len, numbers[:-1])]) - lowest
        return Samples(source, epoch, feistel(row, windows, keys[:, place[source] + epoch]))

    def _key(self, name: str, number: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")


def feistel(index: np.ndarray, size: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Images of each `index` under a keyed permutation of range(size), int64 [N]; `keys` are `round_keys`, [ROUNDS, N].

    A Feistel network permutes the next power of four; what falls outside of range(size) goes through it again.
    """
    # In float64 a logarithm would be off near powers of two: the exponent of the number itself is exact up to 2^53.
    bits = np.frexp(np.maximum(size - 1, 0).astype(np.float64))[1]
    half = np.maximum(1, (bits + 1) // 2).astype(np.uint64)
    mask = (np.uint64(1) << half) - np.uint64(1)
    image = _pass(index.astype(np.uint64), half, mask, keys)
    limit = size.astype(np.uint64)
    outside = np.flatnonzero(image >= limit)
    while len(outside):
        image[outside] = _pass(image[outside], half[outside], mask[outside], keys[:, outside])
        outside = outside[image[outside] >= limit[outside]]
    return image.astype(np.int64)


def _pass(index: np.ndarray, half: np.ndarray, mask: np.ndarray, keys: np.ndarray) -> np.ndarray:
    left, right = index >> half, index & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return (left << half) | right


def round_keys(keys: list[int]) -> np.ndarray:
    """The key of each round, uint64 [ROUNDS, N], from one key below 2^64 for each of N permutations."""
    rounds = np.arange(ROUNDS, dtype=np.uint64)[:, None]
    return _mix(np.array(keys, dtype=np.uint64)[None, :] + rounds)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser, on uint64, which wraps around."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x ^= x >> np.uint64(30)
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x
