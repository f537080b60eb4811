"""x W^T where the weight may lie in another, narrower dtype than the activations (inference on a CPU).

Shapes: R rows, I inputs, O outputs.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

# Up to here a CPU's time goes into reading the weight, beyond into arithmetic, which it does best in float32
# (measured: docs/log.md, 2026-11-21).
FEW_ROWS = 16


def linear(x_RI: Tensor, weight_OI: Tensor) -> Tensor:
    """y_RO in the dtype of x; leading dimensions of x may be any.

    A float32 x on a CPU meets a 16-bit weight in the weight's dtype while rows are few: half the bytes to read.
    Otherwise the weight is cast to the dtype of x.
    """
    narrow = weight_OI.dtype in (torch.bfloat16, torch.float16) and x_RI.dtype == torch.float32
    if narrow and x_RI.device.type == "cpu" and x_RI.numel() <= FEW_ROWS * x_RI.shape[-1]:
        return F.linear(x_RI.to(weight_OI.dtype), weight_OI).to(x_RI.dtype)
    return F.linear(x_RI, weight_OI.to(x_RI.dtype))
