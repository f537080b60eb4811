"""Which part of each tensor a rank holds: the one definition behind building, filling, saving and loading. Torch-free.

Routed experts are shared out over the expert-parallel ranks along their first axis. Tensor parallelism (Megatron's)
cuts projections into it by their outputs, projections out of it by their inputs, and the vocabulary. Everything else is
held whole by every rank.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mm_train import inventory
from mm_train.config import Model

# Last part of a module's name -> axis that tensor parallelism cuts. Linear weights are [out, in].
CUT_BY_OUTPUT = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "embed_tokens")
CUT_BY_INPUT = ("o_proj", "down_proj")


class Box(NamedTuple):
    """A block of a tensor: where it starts and its shape, axis by axis."""

    start: tuple[int, ...]
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """To index the whole tensor with."""
        return tuple(slice(low, low + length) for low, length in zip(self.start, self.shape, strict=True))


class Place(NamedTuple):
    """A rank's place in the two groups that share out tensors."""

    ep_rank: int = 0
    ep_size: int = 1
    tp_rank: int = 0
    tp_size: int = 1


ALONE = Place()


def whole(shape: tuple[int, ...]) -> Box:
    """All of a tensor."""
    return Box((0,) * len(shape), shape)


def local_box(entry: inventory.Entry, place: Place) -> Box:
    """The part of a tensor that the rank at `place` holds."""
    if entry.part == "routed experts":
        return _cut(entry.shape, 0, place.ep_rank, place.ep_size)
    axis = tensor_parallel_axis(entry)
    return whole(entry.shape) if axis is None else _cut(entry.shape, axis, place.tp_rank, place.tp_size)


def tensor_parallel_axis(entry: inventory.Entry) -> int | None:
    """Axis that tensor parallelism cuts; None for a tensor that all its ranks hold."""
    if entry.part == "routed experts":
        return None
    owner = entry.name.split(".")[-2]
    return 0 if owner in CUT_BY_OUTPUT else 1 if owner in CUT_BY_INPUT else None


def local_boxes(model: Model, place: Place) -> Iterator[tuple[inventory.Entry, Box]]:
    """Every tensor of a network with the part of it that the rank at `place` holds, in the module's order."""
    for entry in inventory.tensors(model):
        yield entry, local_box(entry, place)


def _cut(shape: tuple[int, ...], axis: int, rank: int, ranks: int) -> Box:
    length, rest = divmod(shape[axis], ranks)
    assert rest == 0, f"{ranks} ranks cannot share out axis {axis} of {shape}: rules.py should have refused it"
    start = tuple(rank * length if i == axis else 0 for i in range(len(shape)))
    return Box(start, tuple(length if i == axis else size for i, size in enumerate(shape)))
