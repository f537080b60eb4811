"""Which row of which source is sample k, and batches of them. The order is a pure function of (seed, mixture, k).

There is no iterator state: a run that consumed n samples goes on at sample n, at any number of ranks. Proportions are
exact in every block of BLOCK samples; a source's rows are permuted anew each time it has been used up (an epoch).

Shape suffixes: B rows, T tokens.
"""

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE
from mm_train.cli import UserError
from mm_train.shards import ShardReader, check_one_tokenizer
from mm_train.tokenizer import load_tokenizer

BLOCK = 1000  # samples in which every source has its exact share (Loader.identity says so in a key)


@dataclass(frozen=True)
class Sample:
    source: str
    epoch: int
    window: int


@dataclass
class Batch:
    """Rows of tokens with what to predict. Labels are IGNORE where a token is masked or begins a document."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64
    document_BT: Tensor  # int64, number of the token's document within its row
    sources: tuple[str, ...] = ()  # where each row is from

    @property
    def num_scored(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels_BT != IGNORE).sum())

    def to(self, device: torch.device) -> "Batch":
        tokens, labels, document = (
            t.to(device, non_blocking=True) for t in (self.tokens_BT, self.labels_BT, self.document_BT)
        )
        return Batch(tokens, labels, document, self.sources)


def feistel(index: int, size: int, key: int) -> int:
    """Image of `index` under a keyed permutation of range(size): four Feistel rounds, cycles walked back into range."""
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            left, right = right, left ^ (_mix(right ^ _mix(key + round_)) & mask)
        index = (left << half) | right
        if index < size:
            return index


def _mix(x: int) -> int:
    """SplitMix64's finaliser."""
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)


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
    """Sample number k -> (source, epoch, window)."""

    def __init__(self, weights: Mapping[str, float], num_windows: Mapping[str, int], seed: int) -> None:
        """`num_windows` says how many rows each source has (at least one)."""
        # Sorted: the order of keys in a config must not change the order of samples.
        self.quotas = {name: count for name, count in sorted(quotas(weights).items()) if count}
        for name, weight in weights.items():
            if weight and name not in self.quotas:
                raise UserError(
                    f"data.mixture.{name} ({weight}) is below one sample in {BLOCK}: raise it or leave it out"
                )
        self.num_windows = {name: num_windows[name] for name in self.quotas}
        self.seed = seed
        self.owner = [name for name, count in self.quotas.items() for _ in range(count)]
        self.first = {name: self.owner.index(name) for name in self.quotas}

    def __getitem__(self, k: int) -> Sample:
        block, slot = divmod(k, BLOCK)
        slot = feistel(slot, BLOCK, self._key("block", block))
        source = self.owner[slot]
        use = block * self.quotas[source] + slot - self.first[source]
        epoch, row = divmod(use, self.num_windows[source])
        return Sample(source, epoch, feistel(row, self.num_windows[source], self._key(source, epoch)))

    def _key(self, name: str, number: int) -> int:
        digest = hashlib.blake2b(f"{self.seed}/{name}/{number}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little")

    def epochs(self, samples: int) -> dict[str, float]:
        """How often each source is repeated by `samples` samples."""
        return {name: samples * quota / BLOCK / self.num_windows[name] for name, quota in self.quotas.items()}


class Loader:
    """Training batches of a mixture of prepared sources."""

    def __init__(self, path: str | Path, weights: Mapping[str, float], seq_len: int, seed: int) -> None:
        """Raises UserError for a missing source, a damaged shard, or sources of different tokenizers."""
        self.seq_len = seq_len
        self.readers = open_sources(path, weights, "train", seq_len)
        windows = {name: reader.num_windows(seq_len) for name, reader in self.readers.items()}
        self.mixture = Mixture(weights, windows, seed)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON values: same identity, same sample for every k."""
        return {
            "seed": self.mixture.seed,
            "seq_len": self.seq_len,
            "sources": {
                name: {"samples_in_1000": quota, "shards": self.readers[name].manifest.sha256}
                for name, quota in self.mixture.quotas.items()
            },
        }

    def micro_batches(self, first: int, global_rows: int, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch of samples [first, first + global_rows).

        It is cut into blocks of `rows`; micro-step m of rank r takes block m * world + r, so any number of ranks sees
        the same blocks.
        """
        for start in range(first + rank * rows, first + global_rows, world * rows):
            yield self.batch([self.mixture[k] for k in range(start, start + rows)])

    def batch(self, samples: Sequence[Sample]) -> Batch:
        """The rows of `samples`, collated."""
        batch = collate([self.readers[s.source].window(s.window, self.seq_len) for s in samples])
        batch.sources = tuple(s.source for s in samples)
        return batch


def open_sources(path: str | Path, names: Iterable[str], split: str, seq_len: int) -> dict[str, ShardReader]:
    """Readers of `split` of each named source of the data set folder `path`, fit for rows of `seq_len`.

    Raises UserError for a missing folder, source or shard, sources of different tokenizers, a packed source of another
    row length, and a source without a single full row.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"data set folder not found: {path} (prepare one with python -m data_prep.run)")
    for name in names:
        if not (path / name / split).is_dir():
            found = sorted(p.parent.name for p in path.glob(f"*/{split}"))
            raise UserError(f"data set {path} has no {split} split of source {name!r}; it has: {', '.join(found)}")
    readers = {name: ShardReader(path / name / split) for name in names}
    check_one_tokenizer((reader.manifest for reader in readers.values()), load_tokenizer(path).sha256)
    for name, reader in readers.items():
        if reader.num_windows(seq_len) == 0:
            raise UserError(
                f"source {name!r} of {path} has not a single row of {seq_len} tokens in its {split} split:"
                " lower data.seq_len or prepare more text"
            )
    return readers


def collate(windows: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]) -> Batch:
    """Windows of T + 1 tokens (tokens, mask, document starts) -> Batch of T."""
    tokens, mask, starts = (np.stack(parts) for parts in zip(*windows, strict=True))
    labels = np.where(mask[:, 1:] & ~starts[:, 1:], tokens[:, 1:].astype(np.int64), IGNORE)
    return Batch(
        torch.from_numpy(tokens[:, :-1].astype(np.int64)),
        torch.from_numpy(labels),
        torch.from_numpy(starts[:, :-1].cumsum(1).astype(np.int64)),
    )
