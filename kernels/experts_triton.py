"""The expert MLP in Triton: tokens are fetched inside the first product, SwiGLU is the end of it, and the backward pass
needs neither permuted tokens nor expert outputs.

Shapes: T tokens, D model width, K experts per token, R rows, E experts, F expert hidden width, H = 2 F (gate, then up).
`kernels.experts` has the reference and the public functions.

What is kept for the backward pass is the hidden_RH of the first product and nothing else of the size of R. The gradient
of a routing weight is dy . y = dy . (act @ down) = act . (dy @ down^T), whose second factor the backward pass computes
anyway (SonicMoE, arXiv 2512.14080).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device
from kernels.grouped_matmul_triton import (
    BLOCK_I,
    BLOCK_R,
    rows_matmul,
    source_rows,
    tile_table,
    weights_matmul,
)
from kernels.permute_triton import gather


@triton.jit
def _gate_up(
    x_ptr, slot_ptr, weight_ptr, hidden_ptr, act_ptr, table_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """hidden = x @ gate_up[e] and act = silu(gate) * up."""
    tile = tl.program_id(1)
    expert = tl.load(table_ptr + tile * 3)
    if expert >= 0:
        first_row = tl.load(table_ptr + tile * 3 + 1)
        step = tl.arange(0, BLOCK_R)
        row = first_row + step
        is_row = row < tl.load(table_ptr + tile * 3 + 2)
        column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        is_column = column < F
        source = source_rows(slot_ptr, row, is_row, K, GATHER)
        inner = tl.arange(0, BLOCK_D)
        x = x_ptr + source[:, None] * D + inner[None, :]
        gate_weight = weight_ptr + expert.to(tl.int64) * D * 2 * F + inner[:, None] * 2 * F + column[None, :]
        gate = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
        up = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            is_inner = inner < D - first
            here = is_inner[:, None] & is_column[None, :]
            block = tl.load(x, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            gate = tl.dot(block, tl.load(gate_weight, mask=here, other=0.0), gate, input_precision="ieee")
            up = tl.dot(block, tl.load(gate_weight + F, mask=here, other=0.0), up, input_precision="ieee")
            x += BLOCK_D
            gate_weight += BLOCK_D * 2 * F
        here = is_row[:, None] & is_column[None, :]
        dtype: tl.constexpr = hidden_ptr.dtype.element_ty
        gate, up = gate.to(dtype), up.to(dtype)  # what the backward pass will see
        hidden = hidden_ptr + first_row.to(tl.int64) * 2 * F + step[:, None] * 2 * F + column[None, :]
        tl.store(hidden, gate, mask=here)
        tl.store(hidden + F, up, mask=here)
        gate = gate.to(tl.float32)
        act = gate * tl.sigmoid(gate) * up.to(tl.float32)
        tl.store(act_ptr + first_row.to(tl.int64) * F + step[:, None] * F + column[None, :], act.to(dtype), mask=here)


@triton.jit
def _swiglu_backward(
    dact, row_block, step, column, here, slot, is_row, part, routing,
    hidden_ptr, dhidden_ptr, act_ptr, drouting_ptr,
    F: tl.constexpr, WEIGHTED: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """What `_down_backward` stores for one block of dact."""
    dtype: tl.constexpr = dhidden_ptr.dtype.element_ty
    place = step[:, None] * 2 * F + column[None, :]
    hidden, dhidden = hidden_ptr + row_block * 2 * F, dhidden_ptr + row_block * 2 * F
    gate = tl.load(hidden + place, mask=here, other=0.0).to(tl.float32)
    up = tl.load(hidden + place + F, mask=here, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    act = silu * up
    if WEIGHTED:
        tl.store(drouting_ptr + slot * PARTS + part, tl.sum(act * dact, axis=1), mask=is_row)
        dact = dact * routing[:, None]
        act = act * routing[:, None]
    tl.store(act_ptr + row_block * F + step[:, None] * F + column[None, :], act.to(dtype), mask=here)
    tl.store(dhidden + place + F, (dact * silu).to(dtype), mask=here)
    tl.store(dhidden + place, (dact * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype), mask=here)


@triton.jit
def _down_backward(
    dy_ptr, slot_ptr, weight_ptr, hidden_ptr, routing_ptr, dhidden_ptr, act_ptr, drouting_ptr, table_ptr,
    D: tl.constexpr, F: tl.constexpr, K: tl.constexpr, GATHER: tl.constexpr, PARTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_F: tl.constexpr,
):  # fmt: skip
    """From dy: dhidden, the (weighted) act that meets dy in down's gradient, and parts of the weights' gradient."""
    tile = tl.program_id(1)
    expert = tl.load(table_ptr + tile * 3)
    if expert >= 0:
        first_row = tl.load(table_ptr + tile * 3 + 1)
        step = tl.arange(0, BLOCK_R)
        row = first_row + step
        is_row = row < tl.load(table_ptr + tile * 3 + 2)
        part = tl.program_id(0) * 2
        low = part * BLOCK_F + tl.arange(0, BLOCK_F)
        high = low + BLOCK_F
        source = source_rows(slot_ptr, row, is_row, K, GATHER)
        inner = tl.arange(0, BLOCK_D)
        dy = dy_ptr + source[:, None] * D + inner[None, :]
        down_low = weight_ptr + expert.to(tl.int64) * F * D + inner[:, None] + low[None, :] * D
        down_high = down_low + BLOCK_F * D
        dact_low = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
        dact_high = tl.zeros([BLOCK_R, BLOCK_F], dtype=tl.float32)
        for first in range(0, D, BLOCK_D):
            is_inner = inner < D - first
            block = tl.load(dy, mask=is_row[:, None] & is_inner[None, :], other=0.0)
            here_low, here_high = is_inner[:, None] & (low < F)[None, :], is_inner[:, None] & (high < F)[None, :]
            dact_low = tl.dot(block, tl.load(down_low, mask=here_low, other=0.0), dact_low, input_precision="ieee")
            dact_high = tl.dot(block, tl.load(down_high, mask=here_high, other=0.0), dact_high, input_precision="ieee")
            dy += BLOCK_D
            down_low += BLOCK_D
            down_high += BLOCK_D

        slot = row
        routing = tl.zeros([BLOCK_R], dtype=tl.float32)
        if GATHER:
            slot = tl.load(slot_ptr + row, mask=is_row, other=0)
            routing = tl.load(routing_ptr + slot, mask=is_row, other=0.0)
        row_block = first_row.to(tl.int64)
        _swiglu_backward(
            dact_low, row_block, step, low, is_row[:, None] & (low < F)[None, :], slot, is_row, part, routing,
            hidden_ptr, dhidden_ptr, act_ptr, drouting_ptr, F, GATHER, PARTS,
        )  # fmt: skip
        _swiglu_backward(
            dact_high, row_block, step, high, is_row[:, None] & (high < F)[None, :], slot, is_row, part + 1, routing,
            hidden_ptr, dhidden_ptr, act_ptr, drouting_ptr, F, GATHER, PARTS,
        )  # fmt: skip


def _block_f(x: Tensor, hidden: int) -> int:
    """Hidden columns of one accumulator, of which both kernels hold two: as registers and shared memory allow."""
    return min(128 if _capability(x) >= (9, 0) and x.element_size() == 2 else 64, triton.next_power_of_2(hidden))


def _capability(x: Tensor) -> tuple[int, int]:
    """The compute capability of the device; Triton's interpreter takes what Hopper does."""
    return torch.cuda.get_device_capability(x.device) if x.device.type == "cuda" else (9, 0)


def _forward(x: Tensor, gate_up: Tensor, down: Tensor, table: Tensor, rows: int, slot_R: Tensor | None, top_k: int):
    """y_RD and hidden_RH."""
    width, hidden = x.shape[1], down.shape[1]
    hidden_RH, act_RF = x.new_empty(rows, 2 * hidden), x.new_empty(rows, hidden)
    block_f = _block_f(x, hidden)
    _gate_up[(triton.cdiv(hidden, block_f), table.shape[0])](
        x, slot_R, gate_up, hidden_RH, act_RF, table, D=width, F=hidden, K=top_k, GATHER=slot_R is not None,
        BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_I, BLOCK_F=block_f, num_warps=8, num_stages=3,
    )  # fmt: skip
    return rows_matmul(act_RF, down, table), hidden_RH


def _backward(
    dy: Tensor,
    x: Tensor,
    hidden_RH: Tensor,
    gate_up: Tensor,
    down: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
    slot_R: Tensor | None,
    weights_TK: Tensor | None,
):
    """dx_RD, dgate_up and ddown (float32), and dweights_TK."""
    rows, (_, hidden, width) = hidden_RH.shape[0], down.shape
    top_k = 1 if weights_TK is None else weights_TK.shape[1]
    table = tile_table(starts_E, used_E, rows)
    dhidden_RH, act_RF = torch.empty_like(hidden_RH), hidden_RH.new_empty(rows, hidden)
    block_f = max(16, _block_f(x, hidden) // 2)
    parts = 2 * triton.cdiv(hidden, 2 * block_f)
    parts_TKP = None if weights_TK is None else weights_TK.new_zeros(*weights_TK.shape, parts)  # dropped slots stay 0
    _down_backward[(parts // 2, table.shape[0])](
        dy, slot_R, down, hidden_RH, weights_TK, dhidden_RH, act_RF, parts_TKP, table,
        D=width, F=hidden, K=top_k, GATHER=slot_R is not None, PARTS=parts,
        BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_I, BLOCK_F=block_f, num_warps=8, num_stages=3,
    )  # fmt: skip
    ddown = weights_matmul(act_RF, dy, starts_E, used_E, slot_R, top_k, gather="b" if slot_R is not None else "")
    dgate_up = weights_matmul(x, dhidden_RH, starts_E, used_E, slot_R, top_k, gather="a" if slot_R is not None else "")
    dx_RD = rows_matmul(dhidden_RH, gate_up, table, transposed=True)
    return dx_RD, dgate_up, ddown, None if parts_TKP is None else parts_TKP.sum(-1)


@torch.library.custom_op("mobilemoe::mixture", mutates_args=())
@on_its_device
def mixture(
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_cast: Tensor,
    down_cast: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor]:
    """y_TD, the weighted sum of each token's experts, and hidden_RH for the backward pass.

    The `_cast` weights [E, D, H] and [E, F, D] are those that are multiplied, in the dtype of x; the others get the
    gradients, in theirs.
    """
    rows = slot_R.numel()
    table = tile_table(starts_E, used_E, rows)
    y_RD, hidden_RH = _forward(x_TD, gate_up_cast, down_cast, table, rows, slot_R, row_TK.shape[1])
    return gather(y_RD, weights_TK, slot_R, row_TK, full), hidden_RH


@torch.library.custom_op("mobilemoe::mixture_backward", mutates_args=())
@on_its_device
def mixture_backward(
    dy_TD: Tensor,
    x_TD: Tensor,
    weights_TK: Tensor,
    gate_up_cast: Tensor,
    down_cast: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
    hidden_RH: Tensor,
    full: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dx_TD, dweights_TK, dgate_up and ddown, the last three in float32."""
    dx_RD, dgate_up, ddown, dweights_TK = _backward(
        dy_TD.contiguous(), x_TD, hidden_RH, gate_up_cast, down_cast, starts_E, used_E, slot_R, weights_TK
    )
    return gather(dx_RD, None, slot_R, row_TK, full), dweights_TK, dgate_up, ddown


@torch.library.custom_op("mobilemoe::experts", mutates_args=())
@on_its_device
def experts(
    x_RD: Tensor,
    gate_up: Tensor,
    down: Tensor,
    gate_up_cast: Tensor,
    down_cast: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
) -> tuple[Tensor, Tensor]:
    """y_RD and hidden_RH of rows that lie by expert; the weights as in `mixture`."""
    rows = x_RD.shape[0]
    return _forward(x_RD, gate_up_cast, down_cast, tile_table(starts_E, used_E, rows), rows, None, 1)


@torch.library.custom_op("mobilemoe::experts_backward", mutates_args=())
@on_its_device
def experts_backward(
    dy_RD: Tensor,
    x_RD: Tensor,
    gate_up_cast: Tensor,
    down_cast: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
    hidden_RH: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """dx_RD, dgate_up and ddown, the last two in float32."""
    return _backward(dy_RD.contiguous(), x_RD, hidden_RH, gate_up_cast, down_cast, starts_E, used_E, None, None)[:3]


@mixture.register_fake
def _(x_TD, weights_TK, gate_up, down, gate_up_cast, down_cast, slot_R, row_TK, starts_E, used_E, full):
    return torch.empty_like(x_TD), x_TD.new_empty(slot_R.numel(), gate_up.shape[2])


@mixture_backward.register_fake
def _(dy_TD, x_TD, weights_TK, gate_up_cast, down_cast, slot_R, row_TK, starts_E, used_E, hidden_RH, full):
    weights = (torch.empty_like(weight, dtype=torch.float32) for weight in (gate_up_cast, down_cast))
    return torch.empty_like(x_TD), torch.empty_like(weights_TK), *weights


@experts.register_fake
def _(x_RD, gate_up, down, gate_up_cast, down_cast, starts_E, used_E):
    return torch.empty_like(x_RD), x_RD.new_empty(x_RD.shape[0], gate_up.shape[2])


@experts_backward.register_fake
def _(dy_RD, x_RD, gate_up_cast, down_cast, starts_E, used_E, hidden_RH):
    weights = (torch.empty_like(weight, dtype=torch.float32) for weight in (gate_up_cast, down_cast))
    return torch.empty_like(x_RD), *weights


def _save_mixture(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x_TD, weights_TK, gate_up, down, *kept, ctx.full = inputs
    ctx.dtypes = gate_up.dtype, down.dtype
    ctx.save_for_backward(x_TD, weights_TK, *kept, output[1])


def _mixture_backward(ctx, dy_TD, _dhidden):
    dx_TD, dweights_TK, dgate_up, ddown = mixture_backward(dy_TD, *ctx.saved_tensors, ctx.full)
    return dx_TD, dweights_TK, dgate_up.to(ctx.dtypes[0]), ddown.to(ctx.dtypes[1]), *(None,) * 7


def _save_experts(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x_RD, gate_up, down, *kept = inputs
    ctx.dtypes = gate_up.dtype, down.dtype
    ctx.save_for_backward(x_RD, *kept, output[1])


def _experts_backward(ctx, dy_RD, _dhidden):
    dx_RD, dgate_up, ddown = experts_backward(dy_RD, *ctx.saved_tensors)
    return dx_RD, dgate_up.to(ctx.dtypes[0]), ddown.to(ctx.dtypes[1]), *(None,) * 4


mixture.register_autograd(_mixture_backward, setup_context=_save_mixture)
experts.register_autograd(_experts_backward, setup_context=_save_experts)
