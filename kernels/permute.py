"""Tokens to expert rows and back, as gathers in both directions: no scatter, no atomics, repeatable bit for bit.

Shapes: T tokens, K experts per token, E experts, D model width, R expert rows. A *slot* is one (token, k) pair,
numbered token * K + k. A plan is two index tables that invert each other:

    slot_R   which slot fills row r   (T * K: the row is padding)
    row_TK   which row serves the slot (R: the slot was dropped)
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.router import Places


class Plan(NamedTuple):
    """Where each slot goes. `full` is True when no row is padding and no slot is dropped.

    Expert e has `used_E[e]` rows from row `starts_E[e]` on (int32; only in plans that Triton made, whose kernels leave
    the padding between out).
    """

    slot_R: Tensor
    row_TK: Tensor
    full: bool
    starts_E: Tensor | None = None
    used_E: Tensor | None = None


def plan_dropless(ids_TK: Tensor, counts_E: Tensor, places: Places | None = None) -> Plan:
    """Rows sorted by expert, within an expert by slot; every slot has a row (R = T * K).

    With the `places` of a routing by Triton nothing has to be sorted.
    """
    if places is not None:
        return _plan_by_places(ids_TK, counts_E, places, -1)
    slot_R = torch.sort(ids_TK.flatten(), stable=True).indices
    return Plan(slot_R, invert(slot_R).view_as(ids_TK), full=True)


def plan_capacity(ids_TK: Tensor, counts_E: Tensor, capacity: int, places: Places | None = None) -> Plan:
    """Exactly `capacity` rows per expert (R = E * capacity): earlier slots first, later ones dropped, gaps padded."""
    if places is not None:
        return _plan_by_places(ids_TK, counts_E, places, capacity)
    num_slots, num_experts = ids_TK.numel(), counts_E.numel()
    num_rows = num_experts * capacity
    slot_S = torch.sort(ids_TK.flatten(), stable=True).indices
    expert_S = ids_TK.flatten()[slot_S]
    start_E = counts_E.cumsum(0) - counts_E
    position_S = torch.arange(num_slots, device=ids_TK.device) - start_E[expert_S]
    row_S = torch.where(position_S < capacity, expert_S * capacity + position_S, num_rows)
    slot_R = torch.full((num_rows + 1,), num_slots, device=ids_TK.device)
    slot_R[row_S] = slot_S  # all dropped slots land in the last entry, which is cut off
    row_TK = torch.empty_like(row_S)
    row_TK[slot_S] = row_S
    return Plan(slot_R[:num_rows], row_TK.view_as(ids_TK), full=False)


def permute(x_TD: Tensor, plan: Plan) -> Tensor:
    """Copy tokens to their expert rows: x_TD -> x_RD, padding rows zero. Differentiable in x."""
    if use_triton(x_TD):
        from kernels import permute_triton

        return permute_triton.scatter(x_TD, plan.slot_R, plan.row_TK, plan.full)
    return _Permute.apply(x_TD, plan.slot_R, plan.row_TK, plan.full)


def unpermute(y_RD: Tensor, weights_TK: Tensor, plan: Plan) -> Tensor:
    """Weighted sum of each token's expert rows: y_RD -> y_TD; dropped slots add nothing. Differentiable in both."""
    if use_triton(y_RD):
        from kernels import permute_triton

        return permute_triton.gather(y_RD, weights_TK, plan.slot_R, plan.row_TK, plan.full)
    return _Unpermute.apply(y_RD, weights_TK, plan.slot_R, plan.row_TK, plan.full)


def reorder(x_RD: Tensor, index_R: Tensor, inverse_R: Tensor) -> Tensor:
    """x[index] for a permutation and its inverse: the gradient is a gather as well. Differentiable in x."""
    return _Reorder.apply(x_RD, index_R, inverse_R)


def invert(index_R: Tensor) -> Tensor:
    """Inverse of a permutation of row numbers."""
    inverse_R = torch.empty_like(index_R)
    inverse_R[index_R] = torch.arange(index_R.numel(), device=index_R.device)
    return inverse_R


def _plan_by_places(ids_TK: Tensor, counts_E: Tensor, places: Places, capacity: int) -> Plan:
    from kernels import plan_triton

    slot_R, row_TK, starts_E, used_E = plan_triton.plan(ids_TK, *places, counts_E, capacity)
    return Plan(slot_R, row_TK, capacity < 0, starts_E, used_E)


def _rows(x: Tensor, index: Tensor, full: bool) -> Tensor:
    """x[index], where the index one past the end reads zeros."""
    if not full:
        x = torch.cat([x, x.new_zeros(1, *x.shape[1:])])
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


def _sum_of_rows(x_RD: Tensor, row_TK: Tensor, weights_TK: Tensor | None, full: bool) -> Tensor:
    """Sum over k of x[row_TK] (times the weights), where the row one past the end counts as zeros."""
    if weights_TK is not None:
        weights_TK = weights_TK.to(x_RD.dtype)
    if x_RD.device.type != "cpu":
        x_TKD = _rows(x_RD, row_TK, full)
        return x_TKD.sum(1) if weights_TK is None else torch.bmm(weights_TK[:, None], x_TKD)[:, 0]
    # Looking up a bag of embeddings is the same sum in one pass, without x_TKD: a tenth of the time.
    if full:
        return F.embedding_bag(row_TK, x_RD, mode="sum", per_sample_weights=weights_TK)
    kept_TK = row_TK < x_RD.shape[0]
    kept_T = kept_TK.sum(1)
    if weights_TK is not None:
        weights_TK = weights_TK[kept_TK]
    starts_T = kept_T.cumsum(0) - kept_T
    return F.embedding_bag(row_TK[kept_TK], x_RD, starts_T, mode="sum", per_sample_weights=weights_TK)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_RD, index_R, inverse_R):
        ctx.save_for_backward(inverse_R)
        return x_RD.index_select(0, index_R)

    @staticmethod
    def backward(ctx, dout_RD):
        (inverse_R,) = ctx.saved_tensors
        return dout_RD.index_select(0, inverse_R), None, None


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, slot_R, row_TK, full):
        ctx.save_for_backward(row_TK)
        ctx.full = full
        return _rows(x_TD, slot_R // row_TK.shape[1], full)

    @staticmethod
    def backward(ctx, dx_RD):
        (row_TK,) = ctx.saved_tensors
        return _sum_of_rows(dx_RD, row_TK, None, ctx.full), None, None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, weights_TK, slot_R, row_TK, full):
        ctx.save_for_backward(y_RD, weights_TK, slot_R, row_TK)
        ctx.full = full
        return _sum_of_rows(y_RD, row_TK, weights_TK, full)

    @staticmethod
    def backward(ctx, dy_TD):
        y_RD, weights_TK, slot_R, row_TK = ctx.saved_tensors
        weight_R = _rows(weights_TK.flatten(), slot_R, ctx.full)
        dy_RD = _rows(dy_TD, slot_R // row_TK.shape[1], ctx.full)
        dweight_R = torch.bmm(y_RD[:, None], dy_RD[:, :, None]).flatten()  # before dy_RD takes the weights on
        dy_RD *= weight_R.to(dy_TD.dtype)[:, None]
        return dy_RD, _rows(dweight_R, row_TK, ctx.full).to(weights_TK.dtype), None, None, None
