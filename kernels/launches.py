"""What the project's Triton kernels are launched with, written down instead of launched: no GPU is needed.

Every operator runs forward and backward on CPU tensors of the real shapes. What is in them is never read, because
launchers do not ask the device. So kernels, dtypes, constants, warps and stages are those of the launchers, not a copy.
"""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from torch import Tensor
from triton.runtime.jit import JITFunction

from kernels import (
    cross_entropy_triton,
    experts_triton,
    grouped_matmul_triton,
    permute_triton,
    plan_triton,
    router_triton,
)
from kernels.cross_entropy import IGNORE
from kernels.sizes import SCALE, Size

TOKENS = 8192
HEAD_TOKENS, HEAD_WIDTH = 64, 16  # the head's matrix products are torch's, and slow here; its kernel sees V alone
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
}
OPTIONS = ("num_warps", "num_stages")


class Launch(NamedTuple):
    """A kernel and all that it is specialised for."""

    kernel: JITFunction
    signature: dict[str, str]  # argument -> Triton's type, or "constexpr"
    constants: dict[str, Any]
    divisible: tuple[str, ...]  # arguments, and addresses, that are multiples of 16
    options: dict[str, int]

    @property
    def name(self) -> str:
        return self.kernel.__name__.lstrip("_")

    @property
    def says(self) -> str:
        """What tells it from the other launches of its kernel."""
        shown = {k: v for k, v in self.constants.items() if v is not None and k != "IGNORE"}
        return " ".join(f"{k}={int(v) if isinstance(v, bool) else v}" for k, v in shown.items())


def launches(size: Size, dtype: torch.dtype, capability: tuple[int, int]) -> list[Launch]:
    """All different launches of a training step and of evaluation, on a device of this compute capability.

    Raises RuntimeError under TRITON_INTERPRET, where there is nothing to compile.
    """
    with recorded() as found, patch.object(experts_triton, "_capability", lambda x: capability):
        _run_everything(size, dtype)
    different = {(launch.name, repr(launch[1:])): launch for launch in found}
    return list(different.values())


@contextmanager
def recorded() -> Iterator[list[Launch]]:
    """A list that fills with what is launched meanwhile."""
    if not isinstance(router_triton._scan, JITFunction):
        raise RuntimeError("TRITON_INTERPRET is set: kernels are interpreted, not compiled; unset it")
    found: list[Launch] = []

    def launcher(kernel: JITFunction, grid: tuple[int, ...]):
        return lambda *args, **kwargs: found.append(_launch(kernel, args, kwargs))

    with patch.object(JITFunction, "__getitem__", launcher):
        yield found


def _launch(kernel: JITFunction, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Launch:
    """As Triton's launcher specialises: None and 1 are constants, multiples of 16 are marked."""
    options = {key: kwargs.pop(key) for key in OPTIONS if key in kwargs}
    given = inspect.signature(kernel.fn).bind(*args, **kwargs).arguments
    signature, constants, divisible = {}, {}, []
    for parameter in kernel.params:
        name, value = parameter.name, given[parameter.name]
        if parameter.is_constexpr or value is None or (type(value) is int and value == 1):
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[name] = "*" + TYPES[value.dtype]
            divisible.append(name)  # torch's allocator on CUDA aligns to 512 bytes
        elif isinstance(value, float):
            signature[name] = "fp32"
        else:
            signature[name] = "i32" if abs(value) < 2**31 else "i64"
            divisible += [name] * (value % 16 == 0)
    return Launch(kernel, signature, constants, tuple(divisible), options)


def _run_everything(size: Size, dtype: torch.dtype) -> None:
    width, hidden, experts, top_k, classes = size

    def leaf(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, requires_grad=True)

    def backward(*outputs: Tensor) -> None:
        torch.autograd.backward(outputs, [torch.empty_like(out) for out in outputs])

    x_TD, weights_TK = leaf(TOKENS, width), leaf(TOKENS, top_k, dtype=torch.float32)
    gate_up, down = leaf(experts, width, 2 * hidden), leaf(experts, hidden, width)
    casts = gate_up.detach(), down.detach()

    logits_TE = leaf(TOKENS, experts, dtype=torch.float32)
    bias_E = torch.empty(experts)
    ids_TK, weights, counts_E, position_TK, ahead_BE, z_B, _ = router_triton.route(
        logits_TE, bias_E, top_k, SCALE, True, False
    )
    backward(weights, z_B)
    for capacity in (-1, size.capacity(TOKENS)):  # dropless, drop-and-pad
        plan = plan_triton.plan(ids_TK, position_TK, ahead_BE, counts_E, capacity)
        slot_R, row_TK, starts_E, used_E = plan
        x_RD = permute_triton.scatter(x_TD, slot_R, row_TK, capacity < 0)
        backward(permute_triton.gather(x_RD, weights_TK, slot_R, row_TK, capacity < 0))
        index = slot_R, row_TK, starts_E, used_E, capacity < 0
        backward(experts_triton.mixture(x_TD, weights_TK, gate_up, down, *casts, *index)[0])
    x_RD = x_RD.detach().requires_grad_()
    backward(experts_triton.experts(x_RD, gate_up, down, *casts, starts_E, used_E)[0])
    backward(grouped_matmul_triton.grouped_matmul(x_RD, gate_up, casts[0], starts_E, used_E))

    labels_N = torch.zeros(HEAD_TOKENS, dtype=torch.int64)
    hidden_ND, head_VD = leaf(HEAD_TOKENS, HEAD_WIDTH), leaf(classes, HEAD_WIDTH)
    for gradients in (True, False):
        cross_entropy_triton.linear_cross_entropy(hidden_ND, head_VD, head_VD.detach(), labels_N, gradients, IGNORE)
