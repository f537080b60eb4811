"""Batches of a mixture of prepared sources, in the order that order.py gives.

There is no iterator state: any number of ranks, and of threads that read ahead, sees the same batches from any sample
on.

Shape suffixes: B rows, T tokens.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from kernels.attention import Lengths
from kernels.cross_entropy import IGNORE
from mm_train import mixture_change
from mm_train.block_cache import BlockCache
from mm_train.cli import UserError
from mm_train.manifest import check_one_tokenizer
from mm_train.order import Mixture
from mm_train.read_ahead import ReadAhead
from mm_train.remote import RemoteFolder, is_url
from mm_train.shards import Row, ShardReader
from mm_train.tokenizer import load_tokenizer


@dataclass
class Batch:
    """Rows of tokens with what to predict. Labels are IGNORE where a token is masked or begins a document."""

    tokens_BT: Tensor  # int64
    labels_BT: Tensor  # int64
    document_BT: Tensor  # int32, number of the token's document within its row
    sources: tuple[str, ...] = ()  # where each row is from
    cu_seqlens: Tensor | None = None  # int32: where documents begin in the B * T tokens, rows too, and B * T at the end
    max_seqlen: int = 0  # tokens of the longest of these; a document that began in an earlier row counts from there

    @property
    def num_scored(self) -> int:
        """Tokens that count in the loss."""
        return int((self.labels_BT != IGNORE).sum())

    @property
    def lengths(self) -> Lengths | None:
        """Where documents are, for attention by their lengths."""
        return None if self.cu_seqlens is None else Lengths(self.cu_seqlens, self.max_seqlen)

    def positions_BT(self) -> Tensor:
        """Place of each token in its document, from 0 (from the row's beginning for one that began earlier), int32."""
        assert self.cu_seqlens is not None
        begins, lengths = self.cu_seqlens[:-1], self.cu_seqlens.diff()
        total = self.tokens_BT.numel()
        place = torch.arange(total, dtype=torch.int32, device=begins.device)
        return (place - begins.repeat_interleave(lengths, output_size=total)).view_as(self.tokens_BT)

    def to(self, device: torch.device) -> "Batch":
        tokens, labels, document = (
            t.to(device, non_blocking=True) for t in (self.tokens_BT, self.labels_BT, self.document_BT)
        )
        cu_seqlens = None if self.cu_seqlens is None else self.cu_seqlens.to(device, non_blocking=True)
        return Batch(tokens, labels, document, self.sources, cu_seqlens, self.max_seqlen)


class Loader:
    """Training batches of a mixture of prepared sources."""

    def __init__(
        self,
        path: str | Path,
        weights: Mapping[str, float],
        seq_len: int,
        seed: int,
        workers: int = 0,
        ahead: int = 1,
        checked: bool = True,
        cache: BlockCache | None = None,
    ) -> None:
        """`workers` threads read `ahead` global batches further than the one that is asked for; 0: none does.

        `path` is a folder or a URL, `cache` is for what is read from there; `checked`: see ShardReader. Raises
        UserError for a missing source, a damaged shard, or sources of different tokenizers.
        """
        weights = {name: weight for name, weight in weights.items() if weight}  # the others need not be there
        self.seq_len = seq_len
        self.readers = open_sources(path, weights, "train", seq_len, checked, cache)
        windows = {name: reader.num_windows(seq_len) for name, reader in self.readers.items()}
        self._weights, self._num_windows = dict(weights), windows
        self._since: dict[str, Any] | None = None  # where this mixture took over from another one
        self.mixture = Mixture(weights, windows, seed)
        self._ahead = ahead
        self._reading: ReadAhead[tuple[int, int], Batch] | None = None
        if workers:
            self._reading = ReadAhead(lambda key: self.batch(*key), workers)

    @property
    def identity(self) -> dict[str, Any]:
        """What the order depends on, as JSON values: same identity, same sample for every k.

        `since` is there when the mixture took over from another one (mixture_change.py).
        """
        identity = {
            "seed": self.mixture.seed,
            "seq_len": self.seq_len,
            "sources": {
                name: {"samples_in_1000": quota, "shards": self.readers[name].manifest.sha256}
                for name, quota in self.mixture.quotas.items()
            },
        }
        return identity if self._since is None else identity | {"since": self._since}

    def follow(self, before: dict[str, Any], sample: int, on_change: str = "refuse") -> str | None:
        """Go on as the Loader with identity `before`, which would have read `sample` next.

        Where the sources or their shares have changed, mixture_change.py says how `on_change` "continue" goes on; the
        change is returned in words. With "refuse" nothing comes of it but that the identities differ, as with another
        seed or seq_len.
        """
        self._since = None
        here, there = self.identity["sources"], before["sources"]
        changed = here != there and on_change == "continue"
        self._since = mixture_change.take_over(before, sample) if changed else before.get("since")
        since = self._since or mixture_change.START
        used = mixture_change.uses(since, here)
        self.mixture = Mixture(self._weights, self._num_windows, self.mixture.seed, since["sample"], used)
        if self._reading is not None:
            self._reading.forget()
        return mixture_change.in_words(there, here, sample) if changed else None

    def micro_batches(self, first: int, global_rows: int, rows: int, rank: int, world: int) -> Iterator[Batch]:
        """This rank's micro-batches of the global batch of samples [first, first + global_rows).

        It is cut into blocks of `rows`; micro-step m of rank r takes block m * world + r, so any number of ranks sees
        the same blocks.
        """
        now, *soon = (
            [(start, rows) for start in range(begin + rank * rows, begin + global_rows, world * rows)]
            for begin in range(first, first + (self._ahead + 1) * global_rows, global_rows)
        )
        if self._reading is None:
            return (self.batch(*key) for key in now)
        return self._reading.take(now, [key for keys in soon for key in keys])

    def batch(self, first: int, rows: int) -> Batch:
        """Samples [first, first + rows), collated."""
        samples = self.mixture.samples(first, first + rows)
        names = tuple(self.mixture.names[source] for source in samples.source.tolist())
        places = zip(names, samples.window.tolist(), strict=True)
        return collate([self.readers[name].row(window, self.seq_len) for name, window in places], names)

    def close(self) -> None:
        """End the threads that read ahead."""
        if self._reading is not None:
            self._reading.close()


def open_sources(
    path: str | Path,
    names: Iterable[str],
    split: str,
    seq_len: int,
    checked: bool = True,
    cache: BlockCache | None = None,
) -> dict[str, ShardReader]:
    """Readers of `split` of each named source of the data set in the folder or URL `path`, fit for rows of `seq_len`.

    Raises UserError for a missing folder, source or shard, sources of different tokenizers, a packed source of another
    row length, and a source without a single full row.
    """
    if is_url(path):
        readers = {name: ShardReader(RemoteFolder(f"{path}/{name}/{split}", cache), checked) for name in names}
    else:
        path = Path(path)
        if not path.is_dir():
            raise UserError(f"data set folder not found: {path} (prepare one with python -m data_prep.run)")
        for name in names:
            if not (path / name / split).is_dir():
                found = sorted(p.parent.name for p in path.glob(f"*/{split}"))
                raise UserError(f"data set {path} has no {split} split of source {name!r}; it has: {', '.join(found)}")
        readers = {name: ShardReader(path / name / split, checked) for name in names}
    check_one_tokenizer((reader.manifest for reader in readers.values()), load_tokenizer(path).sha256)
    for name, reader in readers.items():
        if reader.num_windows(seq_len) == 0:
            raise UserError(
                f"source {name!r} of {path} has not a single row of {seq_len} tokens in its {split} split:"
                " lower data.seq_len or prepare more text"
            )
    return readers


def collate(rows: Sequence[Row], sources: tuple[str, ...] = ()) -> Batch:
    """Rows of T + 1 tokens -> Batch of T.

    Every token is copied once into tokens and once into labels. Document starts are few: what depends on them is
    computed for all rows together, a call of numpy costing as much as copying a row.
    """
    num_rows, length = len(rows), len(rows[0].tokens) - 1
    tokens_BT, labels_BT = (np.empty((num_rows, length), dtype=np.int64) for _ in range(2))
    for i, row in enumerate(rows):
        tokens_BT[i], labels_BT[i] = row.tokens[:-1], row.tokens[1:]
        if row.mask is not None:
            np.copyto(labels_BT[i], IGNORE, where=row.mask[1:] == 0)
    starts = np.concatenate([row.starts for row in rows])
    owner = np.repeat(np.arange(num_rows), [len(row.starts) for row in rows])
    inside = starts > 0
    labels_BT[owner[inside], starts[inside] - 1] = IGNORE

    inside &= starts < length  # the last token of a row is a label only
    row_begins = np.arange(0, num_rows * length, length)
    begins = np.concatenate([row_begins, starts[inside] + owner[inside] * length])
    begins.sort()
    row_of = begins // length
    # The number of a document is that of the starts so far in its row.
    numbers = np.arange(len(begins)) - begins.searchsorted(row_begins)[row_of]
    numbers += np.bincount(owner[starts == 0], minlength=num_rows)[row_of]
    cu_seqlens = np.append(begins, num_rows * length)
    lengths = cu_seqlens[1:] - begins
    return Batch(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(labels_BT),
        torch.from_numpy(np.repeat(numbers.astype(np.int32), lengths).reshape(num_rows, length)),
        sources,
        torch.from_numpy(cu_seqlens.astype(np.int32)),
        int(lengths.max()),
    )
