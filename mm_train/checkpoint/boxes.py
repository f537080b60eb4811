"""Geometry of stored tensors: flat ranges of blocks, and what two blocks share. Torch-free."""

import math

from mm_train.sharding import Box


def blocks(box: Box, start: int, stop: int) -> list[tuple[int, Box]]:
    """Elements start..stop of a box, row by row, as few blocks: (offset from `start`, block) in that order.

    The elements of each block follow each other in the range. A box of n axes gives at most 2 n - 1 blocks.
    """
    return [(offset - start, block) for offset, block in _blocks(box.start, box.shape, start, stop)]


def _blocks(origin: tuple[int, ...], shape: tuple[int, ...], start: int, stop: int) -> list[tuple[int, Box]]:
    if start >= stop:
        return []
    if len(shape) <= 1:
        return [(start, Box(tuple(o + start for o in origin), (stop - start,) * len(shape)))]
    row = math.prod(shape[1:])
    first, last = -(-start // row), stop // row  # whole rows first..last
    found = []
    if start < first * row:
        found += _in_row(origin, shape, first - 1, start, min(stop, first * row))
    if first < last:
        found.append((first * row, Box((origin[0] + first, *origin[1:]), (last - first, *shape[1:]))))
    if first <= last and last * row < stop:
        found += _in_row(origin, shape, last, last * row, stop)
    return found


def _in_row(
    origin: tuple[int, ...], shape: tuple[int, ...], index: int, start: int, stop: int
) -> list[tuple[int, Box]]:
    """Elements start..stop of a box, all of which lie in its row `index`."""
    skipped = index * math.prod(shape[1:])
    inside = _blocks(origin[1:], shape[1:], start - skipped, stop - skipped)
    return [(skipped + at, Box((origin[0] + index, *b.start), (1, *b.shape))) for at, b in inside]


def intersection(a: Box, b: Box) -> Box | None:
    """The block that two blocks of a tensor share, if any."""
    start = tuple(map(max, a.start, b.start))
    shape = tuple(
        min(x + n, y + m) - low for x, n, y, m, low in zip(a.start, a.shape, b.start, b.shape, start, strict=True)
    )
    return Box(start, shape) if all(length > 0 for length in shape) else None


def relative(inner: Box, outer: Box) -> tuple[slice, ...]:
    """To index a tensor that holds `outer` with, for `inner`, which lies in it."""
    return Box(tuple(i - o for i, o in zip(inner.start, outer.start, strict=True)), inner.shape).slices
