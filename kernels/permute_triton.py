"""Tokens to expert rows and back, in Triton: every token is read once, sums run in a fixed order, nothing is atomic.

Shapes: T tokens, D model width, K experts per token, R rows. `kernels.permute` has the reference and the public
functions. Two kernels do all four directions: `_scatter` writes a token to its rows (permute, and backwards through
unpermute), `_gather` adds a token's rows up (unpermute, and backwards through permute).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device

BLOCK_T = 16  # tokens a program
BLOCK_R = 32  # rows a program, where padding is filled with zeros
BLOCK_D = 256  # columns at a time


@triton.jit
def _scatter(
    x_ptr, row_ptr, slot_ptr, out_ptr, weight_ptr, y_ptr, dweight_ptr,
    num_tokens, num_rows, token_blocks,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[row(t, k)] = x[t] (* weight[t, k], and then dweight[t, k] = x[t] . y[row(t, k)]); later programs: padding."""
    if tl.program_id(0) >= token_blocks:
        padding = (tl.program_id(0) - token_blocks) * BLOCK_R + tl.arange(0, BLOCK_R)
        is_padding = tl.load(slot_ptr + padding, mask=padding < num_rows, other=0) == num_tokens * K
        for start in tl.static_range(0, D, BLOCK_D):
            columns = start + tl.arange(0, BLOCK_D)
            zeros = tl.zeros([BLOCK_R, BLOCK_D], dtype=out_ptr.dtype.element_ty)
            empty = is_padding[:, None] & (columns < D)[None, :]
            tl.store(out_ptr + padding.to(tl.int64)[:, None] * D + columns[None, :], zeros, mask=empty)
    else:
        token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
        is_token = token < num_tokens
        k_lane = tl.arange(0, BLOCK_K)
        dweight = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
        for first in tl.static_range(0, D, BLOCK_D):
            column = first + tl.arange(0, BLOCK_D)
            is_column = (column < D)[None, :]
            x = tl.load(
                x_ptr + token.to(tl.int64)[:, None] * D + column[None, :], mask=is_token[:, None] & is_column, other=0.0
            )
            for k in tl.static_range(K):
                row = tl.load(row_ptr + token * K + k, mask=is_token, other=num_rows)
                place = row.to(tl.int64)[:, None] * D + column[None, :]
                here = (row < num_rows)[:, None] & is_column
                if WEIGHTED:
                    weight = tl.load(weight_ptr + token * K + k, mask=is_token, other=0.0)
                    y = tl.load(y_ptr + place, mask=here, other=0.0).to(tl.float32)
                    dot = tl.sum(x.to(tl.float32) * y, axis=1)
                    dweight += tl.where((k_lane == k)[None, :], dot[:, None], 0.0)
                    tl.store(out_ptr + place, (x * weight[:, None]).to(out_ptr.dtype.element_ty), mask=here)
                else:
                    tl.store(out_ptr + place, x, mask=here)
        if WEIGHTED:
            here = is_token[:, None] & (k_lane < K)[None, :]
            tl.store(dweight_ptr + token[:, None] * K + k_lane[None, :], dweight, mask=here)


@triton.jit
def _gather(
    y_ptr, row_ptr, weight_ptr, out_ptr, num_tokens, num_rows,
    D: tl.constexpr, K: tl.constexpr, WEIGHTED: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """out[t] = sum over k of y[row(t, k)] (* weight[t, k]), in float32, k ascending; dropped slots add nothing."""
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    column = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    is_token, is_column = token < num_tokens, (column < D)[None, :]
    total = tl.zeros([BLOCK_T, BLOCK_D], dtype=tl.float32)
    for k in tl.static_range(K):
        row = tl.load(row_ptr + token * K + k, mask=is_token, other=num_rows)
        here = (row < num_rows)[:, None] & is_column
        y = tl.load(y_ptr + row.to(tl.int64)[:, None] * D + column[None, :], mask=here, other=0.0).to(tl.float32)
        if WEIGHTED:
            y = y * tl.load(weight_ptr + token * K + k, mask=is_token, other=0.0)[:, None]
        total += y
    place = token.to(tl.int64)[:, None] * D + column[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=is_token[:, None] & is_column)


@torch.library.custom_op("mobilemoe::scatter", mutates_args=())
@on_its_device
def scatter(x_TD: Tensor, slot_R: Tensor, row_TK: Tensor, full: bool) -> Tensor:
    """x_RD: each token in its rows, zeros in rows that no slot fills (there are none where `full`)."""
    x_RD = x_TD.new_empty(slot_R.numel(), x_TD.shape[1])
    _launch_scatter(x_TD.contiguous(), slot_R, row_TK, full, x_RD)
    return x_RD


@torch.library.custom_op("mobilemoe::weighted_scatter", mutates_args=())
@on_its_device
def weighted_scatter(
    dy_TD: Tensor, weights_TK: Tensor, y_RD: Tensor, slot_R: Tensor, row_TK: Tensor, full: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of `gather` with weights: dy_RD, and dweights_TK (float32; 0 for dropped slots)."""
    dy_RD, dweights_TK = y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)
    _launch_scatter(
        dy_TD.contiguous(), slot_R, row_TK, full, dy_RD, weights_TK.contiguous(), y_RD.contiguous(), dweights_TK
    )
    return dy_RD, dweights_TK


@torch.library.custom_op("mobilemoe::gather", mutates_args=())
@on_its_device
def gather(y_RD: Tensor, weights_TK: Tensor | None, slot_R: Tensor, row_TK: Tensor, full: bool) -> Tensor:
    """y_TD: the sum of each token's rows, weighted and differentiable where there are weights."""
    (tokens, top_k), (rows, width) = row_TK.shape, y_RD.shape
    y_TD = y_RD.new_empty(tokens, width)
    if tokens:
        _gather[(triton.cdiv(tokens, BLOCK_T), triton.cdiv(width, BLOCK_D))](
            y_RD.contiguous(), row_TK, None if weights_TK is None else weights_TK.contiguous(), y_TD, tokens, rows,
            D=width, K=top_k, WEIGHTED=weights_TK is not None, BLOCK_T=BLOCK_T, BLOCK_D=BLOCK_D,
        )  # fmt: skip
    return y_TD


def _launch_scatter(
    x_TD: Tensor,
    slot_R: Tensor,
    row_TK: Tensor,
    full: bool,
    out_RD: Tensor,
    weights_TK: Tensor | None = None,
    y_RD: Tensor | None = None,
    dweights_TK: Tensor | None = None,
) -> None:
    (tokens, top_k), (rows, width) = row_TK.shape, out_RD.shape
    token_blocks = triton.cdiv(tokens, BLOCK_T)
    programs = token_blocks + (0 if full else triton.cdiv(rows, BLOCK_R))
    if programs:
        _scatter[(programs,)](
            x_TD, row_TK, slot_R, out_RD, weights_TK, y_RD, dweights_TK, tokens, rows, token_blocks,
            D=width, K=top_k, WEIGHTED=weights_TK is not None,
            BLOCK_T=BLOCK_T, BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, BLOCK_K=triton.next_power_of_2(top_k),
        )  # fmt: skip


@scatter.register_fake
def _(x_TD, slot_R, row_TK, full):
    return x_TD.new_empty(slot_R.numel(), x_TD.shape[1])


@weighted_scatter.register_fake
def _(dy_TD, weights_TK, y_RD, slot_R, row_TK, full):
    return y_RD.new_empty(y_RD.shape), weights_TK.new_empty(weights_TK.shape)


@gather.register_fake
def _(y_RD, weights_TK, slot_R, row_TK, full):
    return y_RD.new_empty(row_TK.shape[0], y_RD.shape[1])


def _save_scatter(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    _, slot_R, row_TK, ctx.full = inputs
    ctx.save_for_backward(slot_R, row_TK)


def _scatter_backward(ctx, dx_RD):
    return gather(dx_RD, None, *ctx.saved_tensors, ctx.full), None, None, None


def _save_gather(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    y_RD, weights_TK, slot_R, row_TK, ctx.full = inputs
    ctx.save_for_backward(weights_TK, y_RD, slot_R, row_TK)


def _gather_backward(ctx, dy_TD):
    return *weighted_scatter(dy_TD, *ctx.saved_tensors, ctx.full), None, None, None


scatter.register_autograd(_scatter_backward, setup_context=_save_scatter)
gather.register_autograd(_gather_backward, setup_context=_save_gather)
