"""Grouped matrix products in Triton: rows lie by expert, every expert has a matrix of its own.

Shapes: R rows, E experts, I and O widths. Expert e has rows starts_E[e] up to starts_E[e] + used_E[e], wherever they
begin and however many: a tile of BLOCK_R rows belongs to one expert, and what hangs over is masked. The number of tiles
is only known on the device; `tile_table` has room for all that there could be, and programs without one leave at once.
Rows that belong to nobody are neither read nor written.

A kernel may fetch its rows from somewhere else (`slot_R`: row r is row slot_R[r] // K of the given matrix), so that
permuted tokens never lie in memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device

BLOCK_R = 128  # rows a tile
BLOCK_I = 64  # of the inner dimension at a time
IDLE = -1  # in the tile table: no expert


@triton.jit
def _tile_table(starts_ptr, used_ptr, table_ptr, num_tiles, E: tl.constexpr, BLOCK_R: tl.constexpr,
                BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr):  # fmt: skip
    expert = tl.arange(0, BLOCK_E)
    starts = tl.load(starts_ptr + expert, mask=expert < E, other=0)
    used = tl.load(used_ptr + expert, mask=expert < E, other=0)
    tiles = (used + BLOCK_R - 1) // BLOCK_R
    ends = tl.cumsum(tiles, axis=0)
    tile = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    mine = tl.sum((ends[None, :] <= tile[:, None]).to(tl.int32), axis=1)  # experts whose tiles all come earlier
    hit = mine[:, None] == expert[None, :]
    number = tile - tl.sum(tl.where(hit, (ends - tiles)[None, :], 0), axis=1)
    row = tl.sum(tl.where(hit, starts[None, :], 0), axis=1) + number * BLOCK_R
    end = tl.sum(tl.where(hit, (starts + used)[None, :], 0), axis=1)
    here = tile < num_tiles
    tl.store(table_ptr + tile * 3, tl.where(mine < E, mine, -1), mask=here)  # IDLE
    tl.store(table_ptr + tile * 3 + 1, row, mask=here)
    tl.store(table_ptr + tile * 3 + 2, end, mask=here)


def tile_table(starts_E: Tensor, used_E: Tensor, rows: int, block_r: int = BLOCK_R) -> Tensor:
    """[tiles, 3], int32: expert (or IDLE), first row, and end of the expert's rows, of every tile of `block_r` rows."""
    experts = starts_E.numel()
    tiles = triton.cdiv(rows, block_r) + experts  # every expert can leave one tile partly filled
    table = starts_E.new_empty(tiles, 3, dtype=torch.int32)
    block_e = triton.next_power_of_2(experts)
    _tile_table[(triton.cdiv(tiles, 128),)](
        starts_E, used_E, table, tiles, E=experts, BLOCK_R=block_r, BLOCK_M=128, BLOCK_E=block_e
    )
    return table


@triton.jit
def source_rows(slot_ptr, row, is_row, K: tl.constexpr, GATHER: tl.constexpr):
    """Where the rows of a tile are read from."""
    if GATHER:
        row = tl.load(slot_ptr + row, mask=is_row, other=0) // K
    return row.to(tl.int64)


@triton.jit
def multiply(
    a_ptr, b_ptr, source, is_row, column,
    IN: tl.constexpr, OUT: tl.constexpr, STRIDE_I: tl.constexpr, STRIDE_O: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """Rows `source` of a [., IN] times columns `column` of b [IN, OUT]: a float32 block."""
    inner = tl.arange(0, BLOCK_I)
    a = a_ptr + source[:, None] * IN + inner[None, :]
    b = b_ptr + inner[:, None] * STRIDE_I + column[None, :] * STRIDE_O
    total = tl.zeros([BLOCK_R, BLOCK_O], dtype=tl.float32)
    for first in range(0, IN, BLOCK_I):
        is_inner = inner < IN - first
        a_block = tl.load(a, mask=is_row[:, None] & is_inner[None, :], other=0.0)
        b_block = tl.load(b, mask=is_inner[:, None] & (column < OUT)[None, :], other=0.0)
        total = tl.dot(a_block, b_block, total, input_precision="ieee")
        a += BLOCK_I
        b += BLOCK_I * STRIDE_I
    return total


@triton.jit
def _rows_kernel(
    a_ptr, b_ptr, out_ptr, table_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    tile = tl.program_id(1)
    expert = tl.load(table_ptr + tile * 3)
    if expert >= 0:
        first_row = tl.load(table_ptr + tile * 3 + 1)
        step = tl.arange(0, BLOCK_R)
        is_row = first_row + step < tl.load(table_ptr + tile * 3 + 2)
        column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
        stride_i: tl.constexpr = 1 if TRANSPOSED else OUT
        stride_o: tl.constexpr = IN if TRANSPOSED else 1
        b = b_ptr + expert.to(tl.int64) * IN * OUT
        a = a_ptr + first_row.to(tl.int64) * IN
        out = multiply(a, b, step, is_row, column, IN, OUT, stride_i, stride_o, BLOCK_R, BLOCK_I, BLOCK_O)
        place = first_row.to(tl.int64) * OUT + step[:, None] * OUT + column[None, :]
        tl.store(out_ptr + place, out.to(out_ptr.dtype.element_ty), mask=is_row[:, None] & (column < OUT)[None, :])


def rows_matmul(a_RI: Tensor, b: Tensor, table: Tensor, transposed: bool = False) -> Tensor:
    """out_RO = a_r @ b[expert of row r], with b [E, IN, OUT], or [E, OUT, IN] where `transposed`."""
    rows, inner = a_RI.shape
    outer = b.shape[1] if transposed else b.shape[2]
    out_RO = a_RI.new_empty(rows, outer)
    block_o = min(256 if a_RI.element_size() == 2 else 128, triton.next_power_of_2(outer))  # shared memory is the limit
    _rows_kernel[(triton.cdiv(outer, block_o), table.shape[0])](
        a_RI, b, out_RO, table, IN=inner, OUT=outer, TRANSPOSED=transposed,
        BLOCK_R=BLOCK_R, BLOCK_I=BLOCK_I, BLOCK_O=block_o, num_warps=8, num_stages=3,
    )  # fmt: skip
    return out_RO


@triton.jit
def _weights_kernel(
    a_ptr, b_ptr, slot_ptr, out_ptr, starts_ptr, used_ptr,
    IN: tl.constexpr, OUT: tl.constexpr, K: tl.constexpr, GATHER_A: tl.constexpr, GATHER_B: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    expert = tl.program_id(2)
    start = tl.load(starts_ptr + expert)
    end = start + tl.load(used_ptr + expert)
    inner = tl.program_id(1) * BLOCK_I + tl.arange(0, BLOCK_I)
    column = tl.program_id(0) * BLOCK_O + tl.arange(0, BLOCK_O)
    total = tl.zeros([BLOCK_I, BLOCK_O], dtype=tl.float32)
    for first in range(start, end, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        is_row = row < end
        source_a = source_rows(slot_ptr, row, is_row, K, GATHER_A)
        source_b = source_rows(slot_ptr, row, is_row, K, GATHER_B)
        here_a, here_b = is_row[:, None] & (inner < IN)[None, :], is_row[:, None] & (column < OUT)[None, :]
        a = tl.load(a_ptr + source_a[:, None] * IN + inner[None, :], mask=here_a, other=0.0)
        b = tl.load(b_ptr + source_b[:, None] * OUT + column[None, :], mask=here_b, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
    place = expert.to(tl.int64) * IN * OUT + inner[:, None] * OUT + column[None, :]
    here = (inner < IN)[:, None] & (column < OUT)[None, :]
    tl.store(out_ptr + place, total.to(out_ptr.dtype.element_ty), mask=here)


def weights_matmul(
    a: Tensor,
    b: Tensor,
    starts_E: Tensor,
    used_E: Tensor,
    slot_R: Tensor | None = None,
    top_k: int = 1,
    gather: str = "",
) -> Tensor:
    """out_EIO[e] = a[rows of e]^T @ b[rows of e], in float32; an expert without rows gets zeros.

    `gather` names the operand, "a" or "b", whose rows are those of tokens: slot_R // top_k.
    """
    (_, inner), (_, outer), experts = a.shape, b.shape, starts_E.numel()
    out_EIO = a.new_empty(experts, inner, outer, dtype=torch.float32)
    block_i = min(128, triton.next_power_of_2(inner))
    block_o = min(256 if a.element_size() == 2 else 128, triton.next_power_of_2(outer))
    _weights_kernel[(triton.cdiv(outer, block_o), triton.cdiv(inner, block_i), experts)](
        a, b, slot_R, out_EIO, starts_E, used_E, IN=inner, OUT=outer, K=top_k,
        GATHER_A=gather == "a", GATHER_B=gather == "b",
        BLOCK_R=64, BLOCK_I=block_i, BLOCK_O=block_o, num_warps=8,
        num_stages=5 if gather else 3,  # three buffers: finding rows by an index takes two stages
    )  # fmt: skip
    return out_EIO


@torch.library.custom_op("mobilemoe::grouped_matmul", mutates_args=())
@on_its_device
def grouped_matmul(
    x_RI: Tensor, weight_EIO: Tensor, weight_cast_EIO: Tensor, starts_E: Tensor, used_E: Tensor
) -> Tensor:
    """out_RO, differentiable. `weight_cast_EIO` is multiplied, in the dtype of x; `weight_EIO` gets the gradient."""
    return rows_matmul(x_RI.contiguous(), weight_cast_EIO, tile_table(starts_E, used_E, x_RI.shape[0]))


@torch.library.custom_op("mobilemoe::grouped_matmul_backward", mutates_args=())
@on_its_device
def grouped_matmul_backward(
    dout_RO: Tensor, x_RI: Tensor, weight_cast_EIO: Tensor, starts_E: Tensor, used_E: Tensor
) -> tuple[Tensor, Tensor]:
    """dx_RI and dweight_EIO (float32)."""
    dout_RO = dout_RO.contiguous()
    dx_RI = rows_matmul(dout_RO, weight_cast_EIO, tile_table(starts_E, used_E, x_RI.shape[0]), transposed=True)
    return dx_RI, weights_matmul(x_RI.contiguous(), dout_RO, starts_E, used_E)


@grouped_matmul.register_fake
def _(x_RI, weight_EIO, weight_cast_EIO, starts_E, used_E):
    return x_RI.new_empty(x_RI.shape[0], weight_EIO.shape[2])


@grouped_matmul_backward.register_fake
def _(dout_RO, x_RI, weight_cast_EIO, starts_E, used_E):
    return x_RI.new_empty(x_RI.shape), torch.empty_like(weight_cast_EIO, dtype=torch.float32)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x_RI, weight_EIO, *kept = inputs
    ctx.dtype = weight_EIO.dtype
    ctx.save_for_backward(x_RI, *kept)


def _backward(ctx, dout_RO):
    dx_RI, dweight_EIO = grouped_matmul_backward(dout_RO, *ctx.saved_tensors)
    return dx_RI, dweight_EIO.to(ctx.dtype), None, None, None


grouped_matmul.register_autograd(_backward, setup_context=_save)
