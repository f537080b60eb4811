"""Filling a model with values, one tensor at a time, wherever they come from: nobody ever holds all of them twice.

A model is built on the "meta" device (shapes only), cut to what a rank holds, given memory here, and then filled from a
source: fresh random values, a checkpoint, or a release.
"""

import math
import zlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mm_train import config, inventory
from mm_train.sharding import ALONE, Box, Place, local_boxes

Source = Callable[[str, Box], Tensor]  # a tensor's name, the part that is wanted -> its values


def materialise(model: nn.Module, device: torch.device) -> None:
    """Give memory to the parameters and buffers of a model on the meta device, without values.

    Unlike Module.to_empty it keeps what was noted on parameters (DeepSpeed's groups).
    """
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            real = nn.Parameter(torch.empty_like(parameter, device=device), parameter.requires_grad)
            vars(real).update(vars(parameter))
            setattr(module, name, real)
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, torch.empty_like(buffer, device=device))


@torch.no_grad()
def fill(model: nn.Module, shape: config.Model, source: Source, place: Place = ALONE) -> None:
    """Copy the part of every tensor that the rank at `place` holds from `source` into the model."""
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for entry, box in local_boxes(shape, place):
        tensors[entry.name].copy_(source(entry.name, box))


def initial(shape: config.Model, seed: int) -> Source:
    """Fresh values: matrices normal(0, initializer_range), norms 1, selection bias 0.

    Projections into the residual stream are shrunk by sqrt(2 L) (ours, GPT-2 style). Every tensor has a generator of
    its own, seeded by `seed` and its name (in 32 bits: torch's generator on the CPU ignores more), so the values do
    not depend on the order, the layout or which other tensors exist.
    """
    shapes = {entry.name: entry.shape for entry in inventory.tensors(shape)}

    def read(name: str, box: Box) -> Tensor:
        if len(shapes[name]) < 2:
            return torch.full(box.shape, 0.0 if inventory.is_buffer(name) else 1.0)
        std = shape.initializer_range
        if "o_proj" in name or "down_proj" in name:
            std /= math.sqrt(2 * shape.num_hidden_layers)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode(), seed))
        return torch.randn(shapes[name], generator=generator)[box.slices].mul_(std)

    return read
