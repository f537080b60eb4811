"""The loss of the tied head in Triton: a chunk of logits becomes its own gradient where it lies, in 16 bits.

Shapes: N tokens, D model width, V vocabulary. `kernels.cross_entropy` has the reference and the public function. The
matrix products are torch's. Liger's kernel (which kernels.bench compares with) asks the device for a count and waits
for the answer, so it cannot be captured in a CUDA graph; otherwise the idea is the same.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.backend import on_its_device

CHUNK_ELEMENTS = 2**29  # of logits at once, 1 GiB in 16 bits; the weight's gradient is read and written once a chunk
BLOCK_V = 8192  # classes at a time


@triton.jit
def _softmax_gradient(
    logits_ptr, labels_ptr, loss_ptr, num_classes, IGNORE: tl.constexpr, GRADIENT: tl.constexpr, BLOCK_V: tl.constexpr
):
    """One row: loss = log-sum-exp - logit of the label (NaN for no class); the logits become softmax - one-hot."""
    row = tl.program_id(0)
    label = tl.load(labels_ptr + row)
    logits = logits_ptr + row.to(tl.int64) * num_classes
    is_scored = label != IGNORE
    is_class = (label >= 0) & (label < num_classes)
    target = tl.load(logits + tl.where(is_class, label, 0)).to(tl.float32)  # before any thread overwrites it
    lane = tl.arange(0, BLOCK_V)
    if is_scored:
        top, total = float("-inf"), 0.0
        for first in range(0, num_classes, BLOCK_V):
            x = tl.load(logits + first + lane, mask=first + lane < num_classes, other=float("-inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, axis=0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), axis=0)
            top = higher
        log_sum = top + tl.log(total)
        tl.store(loss_ptr + row, tl.where(is_class, log_sum - target, float("nan")))
        if GRADIENT:
            for first in range(0, num_classes, BLOCK_V):
                here = first + lane < num_classes
                x = tl.load(logits + first + lane, mask=here, other=float("-inf")).to(tl.float32)
                gradient = tl.exp(x - log_sum) - tl.where(first + lane == label, 1.0, 0.0)
                tl.store(logits + first + lane, gradient.to(logits_ptr.dtype.element_ty), mask=here)
    else:
        tl.store(loss_ptr + row, 0.0)
        if GRADIENT:
            for first in range(0, num_classes, BLOCK_V):
                zeros = tl.zeros([BLOCK_V], dtype=logits_ptr.dtype.element_ty)
                tl.store(logits + first + lane, zeros, mask=first + lane < num_classes)


@torch.library.custom_op("mobilemoe::linear_cross_entropy", mutates_args=())
@on_its_device
def linear_cross_entropy(
    hidden_ND: Tensor, weight_VD: Tensor, weight_cast_VD: Tensor, labels_N: Tensor, gradients: bool, ignore: int
) -> tuple[Tensor, Tensor, Tensor]:
    """The summed loss, and with `gradients` dhidden_ND and dweight_VD (float32) for a loss gradient of 1.

    `weight_cast_VD` is multiplied, in the dtype of hidden; `weight_VD` gets the gradient.
    """
    (tokens, _), classes = hidden_ND.shape, weight_cast_VD.shape[0]
    total, dhidden_ND, dweight_VD = _empty(hidden_ND, weight_VD, gradients)
    dweight_VD.zero_()
    losses_N = hidden_ND.new_empty(tokens, dtype=torch.float32)
    rows = max(1, min(tokens, CHUNK_ELEMENTS // classes))
    for first in range(0, tokens, rows):
        hidden, labels = hidden_ND[first : first + rows], labels_N[first : first + rows]
        logits = hidden @ weight_cast_VD.T
        _softmax_gradient[(hidden.shape[0],)](
            logits, labels.contiguous(), losses_N[first:], classes, IGNORE=ignore, GRADIENT=gradients,
            BLOCK_V=min(BLOCK_V, triton.next_power_of_2(classes)),
            num_warps=32,  # one row an SM, so that what is read a second time is in the L2 cache
        )  # fmt: skip
        if gradients:
            torch.mm(logits, weight_cast_VD, out=dhidden_ND[first : first + rows])
            _add_product(dweight_VD, logits.T, hidden)
    torch.sum(losses_N, 0, out=total)
    return total, dhidden_ND, dweight_VD


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, summed in float32 whatever a and b are."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    elif total.is_cuda:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total += (a @ b).float()


def _empty(hidden_ND: Tensor, weight_VD: Tensor, gradients: bool) -> tuple[Tensor, Tensor, Tensor]:
    def like(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.new_empty(tensor.shape if gradients else (0,), dtype=dtype)

    total = hidden_ND.new_empty((), dtype=torch.float32)
    return total, like(hidden_ND, hidden_ND.dtype), like(weight_VD, torch.float32)


@linear_cross_entropy.register_fake
def _(hidden_ND, weight_VD, weight_cast_VD, labels_N, gradients, ignore):
    return _empty(hidden_ND, weight_VD, gradients)


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.dtype = inputs[1].dtype
    ctx.save_for_backward(*output[1:])


def _backward(ctx, dtotal, _dhidden, _dweight):
    dhidden_ND, dweight_VD = ctx.saved_tensors
    return (dhidden_ND * dtotal).to(dhidden_ND.dtype), (dweight_VD * dtotal).to(ctx.dtype), None, None, None, None


linear_cross_entropy.register_autograd(_backward, setup_context=_save)
