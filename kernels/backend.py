"""Which implementation serves a tensor: Triton kernels on CUDA, plain torch elsewhere. Does not import torch."""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec, TypeVar

if TYPE_CHECKING:
    from torch import Tensor

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")
TRITON_IS_INSTALLED = importlib.util.find_spec("triton") is not None


class KernelError(ValueError):
    """Kernels were asked for that cannot run here: a message in one line."""


def use_triton(x: Tensor) -> bool:
    """Whether a kernel's Triton version takes `x`: on CUDA, in float32 or 16 bits.

    The environment variable MM_KERNELS=reference|triton forces one. On a CPU Triton runs in its interpreter only
    (TRITON_INTERPRET=1): slow, for tests.

    Raises KernelError for another value of MM_KERNELS, and where Triton is needed and cannot run.
    """
    forced = os.environ.get("MM_KERNELS", "")
    if forced not in ("", "reference", "triton"):
        raise KernelError(f"MM_KERNELS is {forced!r}; it must be 'reference' or 'triton', or not set")
    if x.element_size() > 4 or forced == "reference":
        return False
    on_cuda = x.device.type == "cuda"
    if not (on_cuda or forced == "triton"):
        return False
    if not on_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise KernelError(f"MM_KERNELS is 'triton' for a tensor on {x.device.type}: set TRITON_INTERPRET=1 too")
    if not TRITON_IS_INSTALLED:
        raise KernelError("Triton is not installed: pip install triton, or set MM_KERNELS=reference")
    return True


def on_its_device(operator: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Wrap what launches kernels: on the GPU of its first argument, a tensor, not on whichever is current."""
    import torch

    @functools.wraps(operator)
    def wrapped(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        first = args[0] if args else next(iter(kwargs.values()))
        with torch.cuda.device_of(first):  # nothing for a CPU tensor
            return operator(*args, **kwargs)

    return wrapped
