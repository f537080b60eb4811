"""The expert MLP over rows grouped by expert: gate and up in one grouped matmul, SwiGLU, down.

Shapes: R rows sorted by expert, E experts, D model width, F expert hidden width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def experts_reference(
    x_RD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    hidden_transform: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> Tensor:
    """One dense MLP an expert, in a loop: slow and obvious. Any dtype."""
    rows = x_RD.split(counts_E.tolist())
    triples = zip(rows, gate_up_EDF, down_EFD, strict=True)
    return torch.cat([hidden_transform(_swiglu(x @ gate_up)) @ down for x, gate_up, down in triples])


def experts(
    x_RD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    hidden_transform: Callable[[Tensor], Tensor] = lambda hidden: hidden,
) -> Tensor:
    """y_r = (silu(g) * u) @ down[e], with (g, u) the halves of x_r @ gate_up[e] (gate first).

    Args:
        x_RD: rows sorted by expert, float32 or bfloat16 (float64 takes the reference, for gradient checks).
        gate_up_EDF: [E, D, 2F], cast to the dtype of x.
        down_EFD: [E, F, D], likewise.
        counts_E: int64 rows of each expert; they add up to R.
        hidden_transform: applied to the input of the down projection (activation quantisation).
    """
    if x_RD.dtype == torch.float64 or x_RD.shape[0] == 0:
        return experts_reference(x_RD, gate_up_EDF.to(x_RD.dtype), down_EFD.to(x_RD.dtype), counts_E, hidden_transform)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_RF = F.grouped_mm(x_RD, gate_up_EDF.to(x_RD.dtype), offs=ends_E)
    return F.grouped_mm(hidden_transform(_swiglu(hidden_RF)), down_EFD.to(x_RD.dtype), offs=ends_E)


def _swiglu(hidden_RF: Tensor) -> Tensor:
    gate, up = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate) * up
