"""Other people's kernels that kernels.bench compares with, where they are installed."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE

# Experts of others: not wired in, because none could be run where this was written.
NOT_WIRED = {"SonicMoE": "sonicmoe", "ScatterMoE": "scattermoe", "MegaBlocks": "megablocks"}


def missing_experts() -> dict[str, str]:
    """Peer -> "not installed", or that it is there and still not measured."""
    return {
        name: "installed, but not wired in" if importlib.util.find_spec(module) else "not installed"
        for name, module in NOT_WIRED.items()
    }


def liger_cross_entropy(
    labels_N: Tensor, classes: int, width: int
) -> Callable[[Tensor, Tensor], tuple[Tensor, ...]] | str:
    """Liger's linear cross-entropy with chunks of the size of ours, or why it cannot be had.

    Its weight gradient is summed in float32, as ours is.
    """
    if labels_N.device.type != "cuda":
        return "needs a GPU"
    try:
        from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    except ImportError:
        return "not installed"
    from kernels.cross_entropy_triton import CHUNK_ELEMENTS

    # apply() takes no names; after `ignore_index` come these, in this order (0.8.5)
    options = (0.0, 0.0, "sum", None, False, torch.float32, False, False, False, None, None)
    budget = liger_budget(labels_N.numel(), classes, width, CHUNK_ELEMENTS // classes)

    def function(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        out = LigerFusedLinearCrossEntropyFunction.apply(hidden, head, labels_N, None, None, IGNORE, *options, budget)
        return (out[0] if isinstance(out, tuple) else out,)

    return function


def liger_chunk(tokens: int, classes: int, width: int, budget: int) -> int:
    """Rows of a chunk of Liger's: tokens over V / (budget D), rounded up to a power of two."""
    chunks = -(-classes // (budget * width))
    rows = -(-tokens // chunks)
    return min(1 << (rows - 1).bit_length(), tokens)


def liger_budget(tokens: int, classes: int, width: int, rows: int) -> int:
    """The `chunk_mem_const` that gives the largest chunks of not more than `rows` rows (1 if all are larger)."""
    budgets = range(1, -(-classes // width) + 1)
    return max((c for c in budgets if liger_chunk(tokens, classes, width, c) <= rows), default=1)
