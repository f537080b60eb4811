"""The int4 tensors of a GGUF file, back in the network's names and orders."""

from collections.abc import Iterator
from pathlib import Path

import torch

from mm_train import config
from mm_train.cli import UserError
from mm_train.gguf import layout
from mm_train.gguf.layout import Tensor
from mm_train.gguf.q4_0 import codes_and_scales
from mm_train.gguf.read import open_file


def int4_tensors(path: Path, model: config.Model) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, int]]:
    """(tensor of the network, codes, scales, axis of its groups) of every Q4_0 tensor that the network has.

    Raises UserError when the file is not of this network.
    """
    stored = {tensor.name: tensor for tensor in open_file(path).tensors}
    for tensor in layout.tensors(model):
        found = stored.get(tensor.name)
        if found is None:
            raise UserError(f"{path} lacks the tensor {tensor.name}: it is of another network")
        shape = tuple(int(size) for size in reversed(found.shape))
        if shape != tensor.shape:
            raise UserError(f"{path}: {tensor.name} is {shape}, and the network's is {tensor.shape}")
        if found.tensor_type.name == "Q4_0":
            codes, scales = (_original(part, tensor, model) for part in codes_and_scales(found.data))
            yield tensor.source, codes, scales, -2 if tensor.view == "experts" else -1


def _original(values: torch.Tensor, tensor: Tensor, model: config.Model) -> torch.Tensor:
    """Codes or scales in the network's order."""
    if tensor.view == "experts":
        return values.transpose(1, 2)
    if tensor.view == "heads":  # first the even rows of a head, then the odd ones
        return values.unflatten(0, (-1, 2, model.head_dim // 2)).transpose(1, 2).flatten(0, 2)
    return values
