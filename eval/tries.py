"""Sequences that begin alike share what they share: all choices of a question become one row, a trie in preorder.

A token of such a row sees its ancestors, and its position is its depth, so the model computes for every path what it
would compute for the sequence alone. Token j is an ancestor of token i, or i itself, when j <= i <= last[j], where
last[j] is the end of j's subtree: one number a token says all about the mask. Rows that begin alike (few-shot prompts)
can have their beginning computed once, as a prefix.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from eval.sequences import Prompt, Scored

MIN_PREFIX = 16  # a prefix is a forward pass of its own: not for a few tokens,
MIN_SAVED = 64  # and not for a few that are saved


class Path(NamedTuple):
    """What one sequence wants of a row: `targets[k]` is predicted at `nodes[k]`."""

    number: int
    nodes: np.ndarray
    targets: np.ndarray


@dataclass(frozen=True)
class Row:
    """A trie of tokens, parents before children. `trunk`: tokens before anything branches or is predicted."""

    ids: np.ndarray
    depth: np.ndarray
    last: np.ndarray
    paths: tuple[Path, ...]
    trunk: int

    def __len__(self) -> int:
        return len(self.ids)


class Cluster(NamedTuple):
    """Rows whose first `prefix` tokens are the same."""

    rows: list[int]
    prefix: int


def order_key(ids: np.ndarray) -> bytes:
    """Sorting by this sorts sequences of ids lexicographically."""
    return ids.astype(">i4").tobytes()


def common(a: np.ndarray, b: np.ndarray) -> int:
    """With how many equal ids both begin."""
    n = min(len(a), len(b))
    unequal = np.flatnonzero(a[:n] != b[:n])
    return int(unequal[0]) if len(unequal) else n


def pack(items: Sequence[tuple[int, Scored]]) -> list[Row]:
    """Numbered sequences of one document as rows: one, unless they do not even begin alike (cut ones do not)."""
    ordered = sorted(items, key=lambda item: order_key(item[1].inputs))
    first, last = ordered[0][1].inputs, ordered[-1][1].inputs
    if common(first, last) or len(ordered) == 1:
        return [_trie(ordered)]
    rows, start = [], 0
    for stop in range(1, len(ordered) + 1):
        if stop == len(ordered) or not common(ordered[stop - 1][1].inputs, ordered[stop][1].inputs):
            rows.append(_trie(ordered[start:stop]))
            start = stop
    return rows


def _trie(ordered: Sequence[tuple[int, Scored]]) -> Row:
    """The trie of sequences in lexicographic order."""
    size = sum(len(sequence.inputs) for _, sequence in ordered)
    ids, depth, last = (np.empty(size, dtype=np.int64) for _ in range(3))
    path = np.empty(0, dtype=np.int64)  # nodes of the sequence before
    before = ordered[0][1].inputs[:0]
    count, trunk, paths = 0, size, []
    for number, sequence in ordered:
        shared = common(before, sequence.inputs)
        if len(path):
            trunk = min(trunk, shared)
        last[path[shared:]] = count - 1
        new = np.arange(count, count + len(sequence.inputs) - shared)
        ids[new], depth[new] = sequence.inputs[shared:], np.arange(shared, len(sequence.inputs))
        count += len(new)
        path, before = np.concatenate([path[:shared], new]), sequence.inputs
        paths.append(Path(number, path[len(path) - sequence.num_targets :], sequence.ids[-sequence.num_targets :]))
        trunk = min(trunk, int(paths[-1].nodes[0]))
    last[path] = count - 1
    return Row(ids[:count], depth[:count], last[:count], tuple(paths), trunk)


def chain(number: int, prompt: Prompt) -> Row:
    """A prompt as a row: nothing branches, and its last token has to be computed."""
    size = len(prompt.ids)
    last = np.full(size, size - 1)
    return Row(prompt.ids.astype(np.int64), np.arange(size), last, (Path(number, last[:1], last[:0]),), size - 1)


def cluster(rows: Sequence[Row]) -> list[Cluster]:
    """Rows by what they begin with; a prefix is 0 where sharing saves too little."""
    order = sorted(range(len(rows)), key=lambda index: order_key(rows[index].ids[: rows[index].trunk]))
    trunks = [rows[index].ids[: rows[index].trunk] for index in order]
    shared = np.array([common(a, b) for a, b in itertools.pairwise(trunks)], dtype=np.int64)
    found = []
    for start, stop in _ranges(shared, len(order)):
        prefix = int(shared[start : stop - 1].min()) if stop - start > 1 else 0
        pays = prefix >= MIN_PREFIX and prefix * (stop - start - 1) >= MIN_SAVED
        found.append(Cluster(order[start:stop], prefix if pays else 0))
    alone = [index for group in found if not group.prefix for index in group.rows]
    return [*([Cluster(alone, 0)] if alone else []), *(group for group in found if group.prefix)]


def _ranges(shared: np.ndarray, count: int) -> Iterator[tuple[int, int]]:
    """Cut 0..count where neighbours share least, as long as the parts save more tokens than the whole does."""
    waiting = [(0, count)]
    while waiting:
        start, stop = waiting.pop()
        if stop - start > 1:
            cut = start + int(shared[start : stop - 1].argmin())
            if _saved(shared, start, cut + 1) + _saved(shared, cut + 1, stop) >= _saved(shared, start, stop):
                waiting += [(cut + 1, stop), (start, cut + 1)]
                continue
        if stop > start:
            yield start, stop


def _saved(shared: np.ndarray, start: int, stop: int) -> int:
    least = int(shared[start : stop - 1].min()) if stop - start > 1 else 0
    return least * (stop - start - 1) if least >= MIN_PREFIX else 0
