"""Fits whole documents into rows of fixed length."""

from collections.abc import Sequence

import numpy as np


def best_fit(lengths: Sequence[int] | np.ndarray, capacity: int) -> list[list[int]]:
    """Rows of document indices, by best-fit-decreasing: the longest first, each into the fullest row that has room.

    Every document is in one row, no row holds more than `capacity` tokens. Rows come in the order of their first
    document, so their lengths are not sorted. Raises ValueError for a length outside 1..capacity.

    Documents of one length are placed together. While the fullest row with room has `space` left, it is also the best
    one for the next document, until it has room for none; so all rows with that space take space // length documents
    each. The work is that of the lengths that occur, not of the documents.
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) == 0:
        return []
    for length in (int(sizes.min()), int(sizes.max())):
        if not 1 <= length <= capacity:
            raise ValueError(f"a document of {length} tokens does not fit a row of {capacity}")
    order = np.argsort(-sizes, kind="stable")
    row_of = np.empty(len(sizes), dtype=np.int64)
    done = num_rows = 0
    rows_by_space: dict[int, list[np.ndarray]] = {}  # stacks: rows, in pieces of arrays, by the tokens left in them
    spaces = 0  # bit s is set when a row with s free tokens exists
    values, counts = np.unique(sizes, return_counts=True)
    for length, left in zip(values[::-1].tolist(), counts[::-1].tolist(), strict=True):
        while left:
            enough = spaces >> length
            space = length + (enough & -enough).bit_length() - 1 if enough else capacity
            each = space // length
            wanted = -(-left // each)  # rows
            if enough:
                rows = _pop(rows_by_space[space], wanted)
                if not rows_by_space[space]:
                    spaces ^= 1 << space
            else:
                rows = np.arange(num_rows, num_rows + wanted)
                num_rows += wanted
            placed = min(left, each * len(rows))
            row_of[order[done : done + placed]] = np.repeat(rows, each)[:placed]
            full, rest = divmod(placed, each)
            for filled, part in ((each, rows[:full]), (rest, rows[full : full + (rest > 0)])):
                if len(part):
                    rows_by_space.setdefault(space - filled * length, []).append(part)
                    spaces |= 1 << (space - filled * length)
            done, left = done + placed, left - placed
    return _listed(row_of, num_rows)


def _pop(stack: list[np.ndarray], count: int) -> np.ndarray:
    """Up to `count` rows off a stack, the last first."""
    taken: list[np.ndarray] = []
    while stack and count:
        piece = stack.pop()
        if len(piece) > count:
            stack.append(piece[:-count])
            piece = piece[-count:]
        taken.append(piece[::-1])
        count -= len(piece)
    return taken[0] if len(taken) == 1 else np.concatenate(taken)


def _listed(row_of: np.ndarray, num_rows: int) -> list[list[int]]:
    """The documents of each row, rows in the order of their first documents."""
    first = np.full(num_rows, len(row_of))
    np.minimum.at(first, row_of, np.arange(len(row_of)))
    rank = np.empty(num_rows, dtype=np.int64)
    rank[np.argsort(first)] = np.arange(num_rows)
    documents = np.argsort(rank[row_of], kind="stable").tolist()
    ends = np.cumsum(np.bincount(rank[row_of], minlength=num_rows)).tolist()
    return [documents[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
