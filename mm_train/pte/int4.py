"""Are the int4 codes and scales of a network in an ExecuTorch program, bit for bit?

A program's constants lie in it as bytes, so what export would write of each tensor is looked for: experts and embedding
with their scales in float32, which hold those of training exactly; linears as XNNPACK stores them: two codes a byte,
the first one low, both plus 8, and scales rounded to bfloat16.
"""

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from mm_train import inventory
from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.pte.pack import pack_experts, pack_table

NOTE = "  scales of attention and head are in bfloat16, as XNNPACK has them; all other scales are exact"


def compare(path: Path, source: ExportSource) -> dict[str, bool]:
    """Tensor of the network -> are its codes and scales in the program? Raises UserError where it cannot be read."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return {
                name: all(data.find(part) >= 0 for part in parts)
                for names, parts in _expected(source)
                for name in names
            }
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from None


def _expected(source: ExportSource) -> Iterator[tuple[list[str], list[bytes]]]:
    """(tensors, bytes that hold them)."""
    entries = {entry.name: entry for entry in inventory.tensors(source.shape)}
    for name, entry in entries.items():
        if "embed_tokens" in name:
            codes, scales = source.int4(name, -1)
            yield [name], [_bytes(pack_table(codes)), _bytes(scales.float()), *_linear(codes, scales)]
        elif entry.part == "routed experts":
            codes, scales = (part.transpose(1, 2) for part in source.int4(name, -2))
            yield [name], [_bytes(pack_experts(codes, scales))]
        elif "_attn." in name:
            yield [name], _linear(*source.int4(name, -1))
        elif name.endswith("gate_proj.weight"):
            names = [name, name.replace("gate_proj", "up_proj")]
            pairs = zip(*(source.int4(part, -1) for part in names), strict=True)
            yield names, [_bytes(pack_experts(*(torch.cat(parts)[None] for parts in pairs)))]
        elif name.endswith("down_proj.weight"):
            yield [name], [_bytes(pack_experts(*(part[None] for part in source.int4(name, -1))))]


def _linear(codes: Tensor, scales: Tensor) -> list[bytes]:
    shifted = (codes + 8).view(torch.uint8)
    return [_bytes(shifted[:, 0::2] | shifted[:, 1::2] << 4), _bytes(scales.bfloat16().view(torch.int16))]


def _bytes(values: Tensor) -> bytes:
    return values.contiguous().numpy().tobytes()
