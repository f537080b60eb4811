"""Fits whole documents into rows of fixed length."""

from collections.abc import Sequence


def best_fit(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Rows of document indices, by best-fit-decreasing: the longest first, each into the fullest row that has room.

    Every document is in one row, no row holds more than `capacity` tokens. Rows come in the order of their first
    document, so their lengths are not sorted. Raises ValueError for a length outside 1..capacity.

    Rows are kept by free space, and a bit set says which free spaces occur: n log n for the sort, and one operation on
    `capacity` bits for each document.
    """
    rows: list[list[int]] = []
    rows_by_space: list[list[int]] = [[] for _ in range(capacity + 1)]
    spaces = 0  # bit s is set when a row with s free tokens exists
    for index in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[index]
        if not 1 <= length <= capacity:
            raise ValueError(f"a document of {length} tokens does not fit a row of {capacity}")
        enough = spaces >> length
        if enough:
            space = length + (enough & -enough).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            space, row = capacity, len(rows)
            rows.append([])
        rows[row].append(index)
        rows_by_space[space - length].append(row)
        spaces |= 1 << (space - length)
    return sorted(sorted(row) for row in rows)
