"""Cross-entropy fused with the vocabulary projection, chunk by chunk: never all logits of a batch at once.

Shapes: N tokens, D model width, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton
from kernels.linear import better_in_float32

IGNORE = -100  # label of a token that is not scored
CHUNK_ROWS = 1024  # logits alive at once: CHUNK_ROWS x V in float32


def linear_cross_entropy_reference(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """The same sum with all logits in memory."""
    logits_NV = hidden_ND @ weight_VD.to(hidden_ND.dtype).T
    logits_NV = logits_NV.to(torch.promote_types(logits_NV.dtype, torch.float32))
    return F.cross_entropy(logits_NV, labels_N, ignore_index=IGNORE, reduction="sum")


def linear_cross_entropy(hidden_ND: Tensor, weight_VD: Tensor, labels_N: Tensor) -> Tensor:
    """Sum over scored tokens of -log softmax(hidden @ weight^T)[label], in nats (float32 scalar).

    The gradients are made in the forward pass while a chunk's logits are at hand (as Liger's kernel does), so the
    backward pass only scales them. `labels_N` is int64 with IGNORE where a token is not scored. The weight is
    multiplied in the dtype of the hidden states; its gradient is summed in float32 and comes in its own dtype.
    """
    if better_in_float32(hidden_ND):
        return linear_cross_entropy(hidden_ND.float(), weight_VD.float(), labels_N)
    needs_gradients = torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad)
    weight_cast_VD = weight_VD.detach().to(hidden_ND.dtype)
    if use_triton(hidden_ND):
        from kernels import cross_entropy_triton

        inputs = (hidden_ND.contiguous(), weight_VD, weight_cast_VD, labels_N)
        return cross_entropy_triton.linear_cross_entropy(*inputs, needs_gradients, IGNORE)[0]
    if needs_gradients:
        return _LinearCrossEntropy.apply(hidden_ND, weight_VD, weight_cast_VD, labels_N)
    total = hidden_ND.new_zeros((), dtype=torch.float32)
    for hidden, labels in zip(hidden_ND.split(CHUNK_ROWS), labels_N.split(CHUNK_ROWS), strict=True):
        total += linear_cross_entropy_reference(hidden, weight_cast_VD, labels)
    return total


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_ND, weight_VD, weight_cast_VD, labels_N):
        total = hidden_ND.new_zeros((), dtype=torch.float32)
        dhidden_ND = torch.empty_like(hidden_ND)
        dweight_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        for start in range(0, hidden_ND.shape[0], CHUNK_ROWS):
            rows = slice(start, start + CHUNK_ROWS)
            hidden, labels = hidden_ND[rows], labels_N[rows]
            scored = labels != IGNORE
            target = labels.where(scored, 0)[:, None]
            logits = (hidden @ weight_cast_VD.T).float()
            log_probs = torch.log_softmax(logits, dim=-1)
            total -= (log_probs.gather(1, target).squeeze(1) * scored).sum()
            dlogits = log_probs.exp_()
            dlogits.scatter_add_(1, target, -torch.ones_like(target, dtype=dlogits.dtype))
            dlogits = dlogits.mul_(scored[:, None]).to(hidden.dtype)
            dhidden_ND[rows] = dlogits @ weight_cast_VD
            dweight_VD += (dlogits.T @ hidden).float()
        ctx.save_for_backward(dhidden_ND, dweight_VD.to(weight_VD.dtype))
        return total

    @staticmethod
    def backward(ctx, dtotal):
        dhidden_ND, dweight_VD = ctx.saved_tensors
        return dhidden_ND * dtotal, dweight_VD * dtotal, None, None
