"""The router in Triton: one pass over the logits chooses, weighs, counts and ranks; a second one scans the counts.

Shapes: T tokens, E experts, K experts per token, B blocks of BLOCK_T tokens. `kernels.router` has the reference and
the public function.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device

BLOCK_T = 64  # tokens a program; also the blocks whose counts are scanned
BLOCK_B = 64  # blocks scanned at once
LOWEST = tl.constexpr(-3.0e38)  # above -inf, which marks what can no longer be chosen


@triton.jit
def scores_of(logits, is_expert, SOFTMAX: tl.constexpr):
    """(scores, log-sum-exp) of a block of logits; scores of lanes past the last expert are 0."""
    top = tl.max(tl.where(is_expert, logits, float("-inf")), axis=1)
    exp = tl.where(is_expert, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(exp, axis=1)
    scores = exp / total[:, None] if SOFTMAX else tl.where(is_expert, tl.sigmoid(logits), 0.0)
    return scores, top + tl.log(total)


@triton.jit
def positions_in_block(chosen):
    """For a 0/1 block [tokens, experts]: how many tokens before this one chose the same expert."""
    return tl.cumsum(chosen, axis=0) - chosen


@triton.jit
def _route_forward(
    logits_ptr, bias_ptr, ids_ptr, weights_ptr, position_ptr, counts_ptr, z_ptr, entropy_ptr,
    num_tokens, scale,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    token = block * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    is_token, is_expert = token < num_tokens, (expert < E)[None, :]
    here = is_token[:, None] & is_expert
    logits = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=here, other=0.0)
    bias = tl.load(bias_ptr + expert, mask=expert < E, other=0.0)
    scores, log_sum = scores_of(logits, is_expert, SOFTMAX)

    candidates = scores + bias[None, :]
    # NaN and -inf would make lanes beyond E win: every token has to choose K different experts, whatever comes.
    candidates = tl.where(candidates > LOWEST, candidates, LOWEST)
    candidates = tl.where(is_expert, candidates, float("-inf"))
    chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.int32)
    ids = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    weights = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.argmax(candidates, axis=1, tie_break_left=True)
        hit = expert[None, :] == best[:, None]
        ids = tl.where((slot == k)[None, :], best[:, None], ids)
        weights = tl.where((slot == k)[None, :], tl.sum(tl.where(hit, scores, 0.0), axis=1)[:, None], weights)
        chosen += hit.to(tl.int32)
        candidates = tl.where(hit, float("-inf"), candidates)
    if NORMALISE:
        weights = weights / (tl.sum(weights, axis=1) + 1e-20)[:, None]
    weights = weights * scale

    chosen = tl.where(here, chosen, 0)
    before = positions_in_block(chosen)
    position = tl.zeros([BLOCK_T, BLOCK_K], dtype=tl.int32)
    for k in tl.static_range(K):
        best = tl.sum(tl.where((slot == k)[None, :], ids, 0), axis=1)
        mine = tl.sum(tl.where(expert[None, :] == best[:, None], before, 0), axis=1)
        position = tl.where((slot == k)[None, :], mine[:, None], position)

    place = token[:, None] * K + slot[None, :]
    is_slot = is_token[:, None] & (slot < K)[None, :]
    tl.store(ids_ptr + place, ids, mask=is_slot)
    tl.store(weights_ptr + place, weights, mask=is_slot)
    tl.store(position_ptr + place, position, mask=is_slot)
    tl.store(counts_ptr + block * E + expert, tl.sum(chosen, axis=0), mask=expert < E)
    tl.store(z_ptr + block, tl.sum(tl.where(is_token, log_sum * log_sum, 0.0), axis=0))
    share = scores / (tl.sum(scores, axis=1) + 1e-20)[:, None]
    entropy = -share * tl.log(tl.where(share > 0, share, 1.0))
    tl.store(entropy_ptr + block, tl.sum(tl.sum(tl.where(here, entropy, 0.0), axis=1), axis=0))


@triton.jit
def _route_backward(
    dweights_ptr, dz_ptr, logits_ptr, ids_ptr, dlogits_ptr,
    num_tokens, scale,
    E: tl.constexpr, K: tl.constexpr, NORMALISE: tl.constexpr, SOFTMAX: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    token = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    expert = tl.arange(0, BLOCK_E)
    is_token, is_expert = token < num_tokens, (expert < E)[None, :]
    here = is_token[:, None] & is_expert
    logits = tl.load(logits_ptr + token[:, None] * E + expert[None, :], mask=here, other=0.0)
    scores, log_sum = scores_of(logits, is_expert, SOFTMAX)

    # weight_k = scale * score_k / sum_j score_j: both sums over the chosen ones.
    dweights = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    chosen = tl.zeros([BLOCK_T, BLOCK_E], dtype=tl.float32)
    for k in tl.static_range(K):
        best = tl.load(ids_ptr + token * K + k, mask=is_token, other=0)
        dweight = tl.load(dweights_ptr + token * K + k, mask=is_token, other=0.0)
        hit = (expert[None, :] == best[:, None]).to(tl.float32)
        chosen += hit
        dweights += hit * dweight[:, None]
    dscores = dweights * scale
    if NORMALISE:
        total = (tl.sum(scores * chosen, axis=1) + 1e-20)[:, None]
        shared = tl.sum(dscores * scores, axis=1)[:, None] / total
        dscores = (dscores - shared * chosen) / total
    if SOFTMAX:
        dlogits = scores * (dscores - tl.sum(dscores * scores, axis=1)[:, None])
    else:
        dlogits = dscores * scores * (1.0 - scores)
    # z = log_sum^2, and log_sum's gradient is the softmax of the logits
    softmax = tl.exp(logits - log_sum[:, None])
    dlogits += tl.load(dz_ptr + tl.program_id(0)) * 2.0 * log_sum[:, None] * softmax
    tl.store(dlogits_ptr + token[:, None] * E + expert[None, :], dlogits, mask=here)


@triton.jit
def _scan(counts_ptr, ahead_ptr, total_ptr, num_blocks, E: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_E: tl.constexpr):
    """Per expert: slots in earlier blocks, and in all; one program, since there are only T / 64 x E counts."""
    expert = tl.arange(0, BLOCK_E)
    is_expert = expert < E
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        block = first + tl.arange(0, BLOCK_B)
        place = block[:, None] * E + expert[None, :]
        here = (block < num_blocks)[:, None] & is_expert[None, :]
        counts = tl.load(counts_ptr + place, mask=here, other=0)
        tl.store(ahead_ptr + place, total[None, :] + tl.cumsum(counts, axis=0) - counts, mask=here)
        total += tl.sum(counts, axis=0)
    tl.store(total_ptr + expert, total.to(tl.int64), mask=is_expert)


@torch.library.custom_op("mobilemoe::route", mutates_args=())
@on_its_device
def route(
    logits_TE: Tensor, bias_E: Tensor, top_k: int, scale: float, normalise: bool, softmax: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """ids_TK, weights_TK, counts_E (int64), position_TK (within the block), ahead_BE, z_B, entropy_B; integers int32.

    `z_B` and `entropy_B` are sums over a block's tokens: added up in a fixed order, results repeat bit for bit.
    """
    tokens, experts = logits_TE.shape
    outputs = _empty(logits_TE, top_k)
    ids_TK, weights_TK, counts_E, position_TK, ahead_BE, z_B, entropy_B = outputs
    blocks, block_e = ahead_BE.shape[0], triton.next_power_of_2(experts)
    counts_BE = torch.empty_like(ahead_BE)
    if blocks:
        _route_forward[(blocks,)](
            logits_TE.contiguous(), bias_E.contiguous(), ids_TK, weights_TK, position_TK, counts_BE, z_B, entropy_B,
            tokens, scale, E=experts, K=top_k, NORMALISE=normalise, SOFTMAX=softmax,
            BLOCK_T=BLOCK_T, BLOCK_E=block_e, BLOCK_K=triton.next_power_of_2(top_k), num_warps=8,
        )  # fmt: skip
    _scan[(1,)](counts_BE, ahead_BE, counts_E, blocks, E=experts, BLOCK_B=BLOCK_B, BLOCK_E=block_e)
    return outputs


@torch.library.custom_op("mobilemoe::route_backward", mutates_args=())
@on_its_device
def route_backward(
    dweights_TK: Tensor, dz_B: Tensor, logits_TE: Tensor, ids_TK: Tensor, scale: float, normalise: bool, softmax: bool
) -> Tensor:
    """dlogits_TE."""
    tokens, experts = logits_TE.shape
    dlogits_TE = logits_TE.new_empty(logits_TE.shape)
    if tokens:
        _route_backward[(triton.cdiv(tokens, BLOCK_T),)](
            dweights_TK.contiguous(), dz_B.contiguous(), logits_TE.contiguous(), ids_TK, dlogits_TE, tokens, scale,
            E=experts, K=ids_TK.shape[1], NORMALISE=normalise, SOFTMAX=softmax,
            BLOCK_T=BLOCK_T, BLOCK_E=triton.next_power_of_2(experts), num_warps=8,
        )  # fmt: skip
    return dlogits_TE


def _empty(logits_TE: Tensor, top_k: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    blocks = (tokens + BLOCK_T - 1) // BLOCK_T
    return (
        logits_TE.new_empty(tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(tokens, top_k),
        logits_TE.new_empty(experts, dtype=torch.int64),
        logits_TE.new_empty(tokens, top_k, dtype=torch.int32),
        logits_TE.new_empty(blocks, experts, dtype=torch.int32),
        logits_TE.new_empty(blocks),
        logits_TE.new_empty(blocks),
    )


@route.register_fake
def _(logits_TE, bias_E, top_k, scale, normalise, softmax):
    return _empty(logits_TE, top_k)


@route_backward.register_fake
def _(dweights_TK, dz_B, logits_TE, ids_TK, scale, normalise, softmax):
    return logits_TE.new_empty(logits_TE.shape)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    logits_TE, _, _, *ctx.options = inputs
    ctx.save_for_backward(logits_TE, output[0])


def _backward(ctx, _ids, dweights_TK, _counts, _position, _ahead, dz_B, _entropy):
    logits_TE, ids_TK = ctx.saved_tensors
    if dweights_TK is None:
        dweights_TK = logits_TE.new_zeros(ids_TK.shape)
    if dz_B is None:
        dz_B = logits_TE.new_zeros((len(logits_TE) + BLOCK_T - 1) // BLOCK_T)
    return route_backward(dweights_TK, dz_B, logits_TE, ids_TK, *ctx.options), None, None, None, None, None


route.register_autograd(_backward, setup_context=_save)
