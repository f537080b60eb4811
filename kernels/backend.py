"""Which implementation serves a tensor: Triton kernels on CUDA, plain torch elsewhere."""

import os

import torch
from torch import Tensor

CHOICES = ("", "reference", "triton")


def use_triton(x: Tensor) -> bool:
    """Whether a kernel's Triton version takes `x`: on CUDA, in float32 or 16 bits.

    The environment variable MM_KERNELS=reference|triton forces one. On a CPU Triton runs in its interpreter only
    (TRITON_INTERPRET=1): slow, for tests.

    Raises ValueError for another value of MM_KERNELS, and where Triton is forced and cannot run.
    """
    forced = os.environ.get("MM_KERNELS", "")
    if forced not in CHOICES:
        raise ValueError(f"MM_KERNELS is {forced!r}; it must be 'reference' or 'triton', or not set")
    if x.dtype == torch.float64 or forced == "reference":
        return False
    if forced == "triton" and x.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"MM_KERNELS is 'triton' for a tensor on {x.device.type}: set TRITON_INTERPRET=1 too")
    return forced == "triton" or x.device.type == "cuda"
