"""The expert MLP over rows grouped by expert: gate and up in one grouped matmul, SwiGLU, down.

Shapes: R rows sorted by expert, E experts, D model width, F expert hidden width.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.linear import FEW_ROWS, better_in_float32, linear
from kernels.permute import Plan, permute, unpermute

Transform = Callable[[Tensor], Tensor]


def experts_reference(
    x_RD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    hidden_transform: Transform | None = None,
) -> Tensor:
    """One dense MLP an expert, in a loop: slow and obvious. Any dtype."""
    hidden_transform = hidden_transform or _as_it_is
    rows = x_RD.split(counts_E.tolist())
    triples = zip(rows, gate_up_EDF, down_EFD, strict=True)
    return torch.cat([hidden_transform(_swiglu(x @ gate_up)) @ down for x, gate_up, down in triples])


def experts(
    x_RD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    hidden_transform: Transform | None = None,
) -> Tensor:
    """y_r = (silu(g) * u) @ down[e], with (g, u) the halves of x_r @ gate_up[e] (gate first).

    Args:
        x_RD: rows sorted by expert, float32 or bfloat16 (float64 takes the reference, for gradient checks).
        gate_up_EDF: [E, D, 2F], cast to the dtype of x. float32 rows on a CPU may meet 16-bit weights, which should
            then lie in memory as [E, 2F, D], and `down_EFD` as [E, D, F]: see kernels.linear.
        down_EFD: [E, F, D], likewise.
        counts_E: int64 rows of each expert; they add up to R.
        hidden_transform: applied to the input of the down projection (activation quantisation).
    """
    if use_triton(x_RD):
        return _experts_triton(x_RD, gate_up_EDF, down_EFD, counts_E, hidden_transform)
    hidden_transform = hidden_transform or _as_it_is
    if x_RD.dtype == torch.float64 or x_RD.shape[0] == 0:
        return experts_reference(x_RD, gate_up_EDF.to(x_RD.dtype), down_EFD.to(x_RD.dtype), counts_E, hidden_transform)
    if better_in_float32(x_RD):  # once for all three products
        return experts(x_RD.float(), gate_up_EDF, down_EFD, counts_E, hidden_transform).to(x_RD.dtype)
    narrow = x_RD.device.type == "cpu" and x_RD.dtype == torch.float32 and gate_up_EDF.dtype != torch.float32
    if narrow or any(width * x_RD.element_size() % 16 for width in down_EFD.shape[1:]):  # what grouped_mm cannot take
        return _experts_hit(x_RD, gate_up_EDF, down_EFD, counts_E, hidden_transform)
    ends_E = counts_E.cumsum(0).to(torch.int32)
    hidden_RF = F.grouped_mm(x_RD, gate_up_EDF.to(x_RD.dtype), offs=ends_E)
    return F.grouped_mm(hidden_transform(_SwiGLU.apply(hidden_RF)), down_EFD.to(x_RD.dtype), offs=ends_E)


def mixture(
    x_TD: Tensor,
    weights_TK: Tensor,
    plan: Plan,
    counts_E: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    hidden_transform: Transform | None = None,
) -> Tensor:
    """y_TD: the weighted sum of each token's experts, all of which are here: unpermute(experts(permute(x))).

    On CUDA one operator without permuted tokens in memory. Arguments as for `experts` and kernels.permute; `counts_E`
    are the rows of each expert in the plan, padding included.
    """
    if use_triton(x_TD) and hidden_transform is None and plan.starts_E is not None and plan.used_E is not None:
        from kernels import experts_triton

        return experts_triton.mixture(
            x_TD.contiguous(),
            weights_TK.contiguous(),
            *_with_casts(gate_up_EDF, down_EFD, x_TD.dtype),
            plan.slot_R,
            plan.row_TK,
            plan.starts_E,
            plan.used_E,
            plan.full,
        )[0]
    y_RD = experts(permute(x_TD, plan), gate_up_EDF, down_EFD, counts_E, hidden_transform)
    return unpermute(y_RD, weights_TK, plan)


def experts_of_few_tokens(
    x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor
) -> Tensor:
    """y_TD (float32): the weighted sum of each token's experts, without any permutation; for decoding on a CPU.

    For so few tokens the bookkeeping of grouped rows takes longer than the products. `x_TD` is in the dtype of the
    weights, which should lie in memory as [E, 2F, D] and [E, D, F] if that is a 16-bit one.
    """
    outputs = [
        linear(_swiglu(linear(x, gate_up_EDF[expert].T)), down_EFD[expert].T)
        for x, chosen in zip(x_TD.split(1), ids_TK.tolist(), strict=True)
        for expert in chosen
    ]
    y_TKD = torch.cat(outputs).view(*ids_TK.shape, -1).float()
    return (weights_TK[:, None] @ y_TKD)[:, 0]


def _experts_triton(
    x_RD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor, hidden_transform: Transform | None
) -> Tensor:
    from kernels import experts_triton
    from kernels.grouped_matmul_triton import grouped_matmul

    ends_E = counts_E.cumsum(0)
    rows = (ends_E - counts_E).int(), counts_E.int()
    gate_up, down, gate_up_cast, down_cast = _with_casts(gate_up_EDF, down_EFD, x_RD.dtype)
    if hidden_transform is None:
        return experts_triton.experts(x_RD.contiguous(), gate_up, down, gate_up_cast, down_cast, *rows)[0]
    hidden_RF = hidden_transform(_swiglu(grouped_matmul(x_RD, gate_up, gate_up_cast, *rows)))
    return grouped_matmul(hidden_RF, down, down_cast, *rows)


def _with_casts(gate_up_EDF: Tensor, down_EFD: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both weights, which get gradients in their own dtype, and what is multiplied."""
    gate_up_cast, down_cast = (weight.detach().to(dtype).contiguous() for weight in (gate_up_EDF, down_EFD))
    return gate_up_EDF, down_EFD, gate_up_cast, down_cast


def _experts_hit(
    x_RD: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    counts_E: Tensor,
    hidden_transform: Transform,
) -> Tensor:
    """Only the experts that have rows, each as it lies in memory: reading whole weights costs more than the loop."""
    counts = counts_E.tolist()
    chosen = [expert for expert, count in enumerate(counts) if count]
    rows = x_RD.to(gate_up_EDF.dtype) if x_RD.shape[0] <= FEW_ROWS else x_RD  # what linear() would do, once for all
    outputs = []
    for expert, x in zip(chosen, rows.split([counts[expert] for expert in chosen]), strict=True):
        hidden = hidden_transform(_swiglu(linear(x, gate_up_EDF[expert].T)))
        outputs.append(linear(hidden, down_EFD[expert].T))
    return torch.cat(outputs).to(x_RD.dtype)


def _as_it_is(hidden: Tensor) -> Tensor:
    return hidden


def _swiglu(hidden_RF: Tensor) -> Tensor:
    gate, up = hidden_RF.chunk(2, dim=-1)
    return F.silu(gate) * up


class _SwiGLU(torch.autograd.Function):
    """`_swiglu` that keeps its input alone and makes silu(gate) again: a third less to hold than autograd's.

    The gradients of gate and up are written where they belong in the input's, and no buffer is made that another can
    serve as: on a CPU, touching fresh memory takes longer than the arithmetic.
    """

    @staticmethod
    def forward(ctx, hidden_RF):
        ctx.save_for_backward(hidden_RF)
        gate, up = hidden_RF.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)

    @staticmethod
    def backward(ctx, dout_RF):
        (hidden_RF,) = ctx.saved_tensors
        gate, up = hidden_RF.chunk(2, dim=-1)
        dhidden_RF = torch.empty_like(hidden_RF)
        dgate, dup = dhidden_RF.chunk(2, dim=-1)
        scratch = F.silu(gate)
        torch.mul(scratch, dout_RF, out=dup)
        torch.mul(up, dout_RF, out=scratch)
        torch.ops.aten.silu_backward.grad_input(scratch, gate, grad_input=dgate)
        return dhidden_RF
