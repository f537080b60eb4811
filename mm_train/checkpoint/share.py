"""What one rank writes into a checkpoint, and the copy of it in memory from which it is written."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from mm_train import config
from mm_train.checkpoint.files import Vector
from mm_train.checkpoint.format import RNG, Part
from mm_train.cli import UserError
from mm_train.engine import Engine
from mm_train.inventory import KINDS
from mm_train.parallel.groups import Groups
from mm_train.sharding import local_boxes, whole

SEGMENT = 1 << 28  # elements; pinned memory is given out in powers of two


class Share(NamedTuple):
    """A rank's part of a checkpoint."""

    parts: list[Part]
    vectors: list[Vector]  # in the order of the file: one kind behind the other, so that weights alone are one piece
    tensors: list[Tensor]  # of the vectors, 1-D, live; torch's random state comes last and is a copy

    @property
    def bytes(self) -> int:
        return sum(vector.bytes for vector in self.vectors)


def share_of(engine: Engine, model: config.Model, groups: Groups) -> Share:
    """What this rank answers for; the main rank also for buffers and torch's random state."""
    boxes = {entry.name: box for entry, box in local_boxes(model, groups.place)}
    keys: set[str] = set()
    parts: list[Part] = []
    states: list[dict[str, Tensor]] = []
    for fragment in engine.fragments():
        name, start, stop = fragment
        key = name if name not in keys else f"{name}@{start}"
        keys.add(key)
        parts.append(Part(name, boxes[name], start, stop, key))
        states.append(engine.state(fragment))
    if groups.is_main:
        for name, buffer in engine.model.named_buffers():
            parts.append(Part(name, whole(tuple(buffer.shape)), 0, buffer.numel(), name))
            states.append({"weight": buffer.detach().float().view(-1)})
    vectors: list[Vector] = []
    tensors: list[Tensor] = []
    for kind in KINDS:
        for part, state in zip(parts, states, strict=True):
            if kind in state:
                assert (state[kind].dtype, *state[kind].shape) == (torch.float32, part.stop - part.start), part
                vectors.append(Vector(f"{kind}/{part.key}", "F32", part.stop - part.start))
                tensors.append(state[kind])
    if groups.is_main:
        tensors.append(torch.get_rng_state())
        vectors.append(Vector(RNG, "U8", tensors[-1].numel()))
    return Share(parts, vectors, tensors)


class Staging:
    """Room for a rank's tensors, taken once and used for every checkpoint: 12 bytes a parameter that it answers for
    (8 of those that Muon moves).

    Pinned where the tensors are on a GPU, so that all of them are copied at the same time.
    """

    def __init__(self) -> None:
        self._segments: list[Tensor] = []

    @torch.no_grad()
    def copy(self, tensors: Sequence[Tensor]) -> list[memoryview]:
        """The bytes of `tensors` (float32 vectors; others, which are few, are taken as they are), in their order.

        They stay as they are until the next call, whatever becomes of the tensors.
        """
        self.reserve(tensors)
        live = [tensor.detach() for tensor in tensors if tensor.dtype == torch.float32]
        used = sum(tensor.numel() for tensor in live)
        position = 0
        for tensor in live:
            for piece in _pieces(tensor, position):
                segment, start = divmod(position, SEGMENT)
                room = self._segments[segment][start : start + piece.numel()]
                if piece.is_cuda:
                    room.copy_(piece, non_blocking=True)
                else:  # torch's threads would wait for each other at every tensor, long where the cores are busy
                    np.copyto(room.numpy(), piece.numpy())
                position += piece.numel()
        if any(tensor.is_cuda for tensor in live):
            torch.cuda.current_stream().synchronize()
        filled = [segment[: max(0, used - i * SEGMENT)] for i, segment in enumerate(self._segments)]
        return [as_bytes(t) for t in filled] + [as_bytes(t) for t in tensors if t.dtype != torch.float32]

    def reserve(self, tensors: Sequence[Tensor]) -> None:
        """Take memory for a copy of `tensors`, unless there is enough. Raises UserError when there is too little."""
        size = sum(tensor.numel() for tensor in tensors if tensor.dtype == torch.float32)
        if sum(segment.numel() for segment in self._segments) >= size:
            return
        self._segments = []  # the old ones go first: there may not be room for both
        pinned = any(tensor.is_cuda for tensor in tensors)
        for start in range(0, size, SEGMENT):
            length = min(SEGMENT, size - start)
            try:
                self._segments.append(torch.empty(length, dtype=torch.float32, pin_memory=pinned).zero_())
            except (RuntimeError, MemoryError):
                self._segments = []
                raise UserError(
                    f"no memory for the copy that checkpoints are written from: {in_words(4 * size)} in this"
                    " process; checkpoint.asynchronous=false does without it"
                ) from None


def _pieces(tensor: Tensor, position: int) -> Iterator[Tensor]:
    """A vector that goes to `position`, cut where a segment ends."""
    while tensor.numel():
        room = SEGMENT - position % SEGMENT
        yield tensor[:room]
        tensor, position = tensor[room:], position + min(room, tensor.numel())


def as_bytes(tensor: Tensor) -> memoryview:
    """The memory of a vector, on the CPU."""
    return tensor.detach().cpu().numpy().data.cast("B") if tensor.numel() else memoryview(b"")


def in_words(size: int) -> str:
    """Bytes, for people."""
    return f"{size / 2**30:,.2f} GiB" if size >= 2**30 else f"{size / 2**20:,.1f} MiB"
