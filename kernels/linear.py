"""x W^T where the weight may lie in another dtype than the activations, or the processor be slow in theirs.

Shapes: R rows, I inputs, O outputs.
"""

import functools

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here a CPU's time goes into reading the weight, beyond into arithmetic, which it does best in float32
# (measured: docs/log.md, 2026-11-21).
FEW_ROWS = 16


def linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """y_RO in the dtype of x; leading dimensions of x may be any.

    A float32 x on a CPU meets a 16-bit weight in the weight's dtype while rows are few: half the bytes to read.
    Otherwise the weight is cast to the dtype of x, or both to float32 and the result back: see `better_in_float32`.
    """
    narrow = weight_OI.dtype in (torch.bfloat16, torch.float16)
    few = narrow and x_RI.device.type == "cpu" and x_RI.numel() <= FEW_ROWS * x_RI.shape[-1]
    if few and x_RI.dtype == torch.float32:
        return F.linear(x_RI.to(weight_OI.dtype), weight_OI).to(x_RI.dtype)
    if better_in_float32(x_RI) and not few:
        return F.linear(x_RI.float(), weight_OI.float()).to(x_RI.dtype)
    return F.linear(x_RI, weight_OI.to(x_RI.dtype))


def better_in_float32(x: Tensor) -> bool:
    """Whether x is bfloat16 on a processor where products of bfloat16 matrices are best made in float32 and rounded.

    Neither factor is rounded on the way then, so that the result is at least as close to the exact one.
    """
    return x.dtype == torch.bfloat16 and x.device.type == "cpu" and not _multiplies_bfloat16()


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether torch hands bfloat16 matrix products to oneDNN on this processor (AVX-512, AMX, Arm's bf16 extension).

    Elsewhere they run in plain loops, on AVX2 4 to 77 times slower than float32 (measured: docs/log.md, 2026-11-24).
    """
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
