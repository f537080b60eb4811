"""Rows for slots, in Triton: from a token's place among its expert's tokens to the row that it gets.

Shapes: T tokens, E experts, K experts per token, R rows, B blocks of tokens. `kernels.permute` has the reference and
the public functions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device
from kernels.router_triton import BLOCK_T

BLOCK_S = 128  # slots a program


@triton.jit
def _rows(
    ids_ptr, position_ptr, ahead_ptr, counts_ptr, row_ptr, slot_ptr, starts_ptr, used_ptr,
    num_slots, num_rows, capacity,
    E: tl.constexpr, DROPLESS: tl.constexpr,
    BLOCK_S: tl.constexpr, BLOCK_E: tl.constexpr, SLOTS_OF_A_BLOCK: tl.constexpr,
):  # fmt: skip
    expert = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + expert, mask=expert < E, other=0).to(tl.int32)
    if DROPLESS:
        starts, used = tl.cumsum(counts, axis=0) - counts, counts
    else:
        starts, used = expert * capacity, tl.minimum(counts, capacity)
    if tl.program_id(0) == 0:
        tl.store(starts_ptr + expert, starts, mask=expert < E)
        tl.store(used_ptr + expert, used, mask=expert < E)

    slot = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    is_slot = slot < num_slots
    mine = tl.load(ids_ptr + slot, mask=is_slot, other=0)
    position = tl.load(position_ptr + slot, mask=is_slot, other=0)
    position += tl.load(ahead_ptr + (slot // SLOTS_OF_A_BLOCK) * E + mine, mask=is_slot, other=0)
    start = tl.sum(tl.where(mine[:, None] == expert[None, :], starts[None, :], 0), axis=1)
    row = start + position
    if not DROPLESS:
        row = tl.where(position < capacity, row, num_rows)
    tl.store(row_ptr + slot, row, mask=is_slot)
    tl.store(slot_ptr + row, slot, mask=is_slot & (row < num_rows))


@torch.library.custom_op("mobilemoe::plan", mutates_args=())
@on_its_device
def plan(
    ids_TK: Tensor, position_TK: Tensor, ahead_BE: Tensor, counts_E: Tensor, capacity: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """slot_R, row_TK, starts_E and used_E (all int32): see kernels.permute.Plan. A negative capacity means dropless."""
    outputs = slot_R, row_TK, starts_E, used_E = _empty(ids_TK, counts_E, capacity)
    slots, experts = ids_TK.numel(), counts_E.numel()
    if capacity > 0:
        slot_R.fill_(slots)
    # At least one program: it writes starts and counts.
    _rows[(max(1, triton.cdiv(slots, BLOCK_S)),)](
        ids_TK, position_TK, ahead_BE, counts_E, row_TK, slot_R, starts_E, used_E,
        slots, slot_R.numel(), capacity, E=experts, DROPLESS=capacity < 0,
        BLOCK_S=BLOCK_S, BLOCK_E=triton.next_power_of_2(experts), SLOTS_OF_A_BLOCK=BLOCK_T * ids_TK.shape[1],
    )  # fmt: skip
    return outputs


def _empty(ids_TK: Tensor, counts_E: Tensor, capacity: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows = capacity * counts_E.numel() if capacity >= 0 else ids_TK.numel()
    return (
        ids_TK.new_empty(rows),
        torch.empty_like(ids_TK),
        torch.empty_like(counts_E, dtype=torch.int32),
        torch.empty_like(counts_E, dtype=torch.int32),
    )


@plan.register_fake
def _(ids_TK, position_TK, ahead_BE, counts_E, capacity):
    return _empty(ids_TK, counts_E, capacity)
