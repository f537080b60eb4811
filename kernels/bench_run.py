"""One case of kernels.bench: every way is checked against float32, run twice, and then measured."""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import torch._functorch.config
from torch import Tensor

from kernels.bench_cases import BYTES, COMPILED, OURS, REFERENCE, Case, Function
from kernels.bench_measure import error, measure

GIB = 2**30


def run_case(
    case: Case, device: torch.device, machine: dict[str, float], compiled: str = "", only: str = ""
) -> dict[str, Any]:
    """What is known of one case afterwards.

    Args:
        machine: "bytes" and "flops" a second that this machine reaches.
        compiled: why torch.compile is left out; "" to measure it.
        only: why all but ours is left out; "" to measure everything.

    Returns `passes`: for "forward", "backward" or "forward+backward" the necessary work and for every way its figures,
    or {"absent": why}. `times_ours` is a way's time over that of ours: above 1, ours is faster.
    """
    ways: dict[str, Function] = dict(case.ways)
    absent = dict(case.absent)
    if compiled or only:
        absent[COMPILED] = compiled or only
    else:
        torch._dynamo.reset()
        ways[COMPILED] = torch.compile(case.compiled or case.ways[REFERENCE], dynamic=False)
    names = ["forward+backward"] if case.joint else ["forward", "backward"] if case.backward else ["forward"]
    passes: dict[str, dict[str, Any]] = {
        name: {"necessary": case.backward if name == "backward" else case.forward, "ways": {}} for name in names
    }
    expected = results(case, case.exact, torch.float32)
    for way, function in ways.items():
        if only and way != OURS:
            absent[way] = only
            continue
        try:
            # Gradients are taken many times from one forward pass: what torch.compile saved for it must stay.
            with torch._functorch.config.patch(donated_buffer=False):
                found = _way(case, function, expected, device, passes)
        except Exception as problem:  # a way that fails is an entry, and no end of the others
            found = {name: {"absent": _said(problem)} for name in names}
        for name in names:
            passes[name]["ways"][way] = found[name]
        if device.type == "cuda":
            torch.cuda.empty_cache()
    for facts in passes.values():
        facts["ways"] |= {way: {"absent": why} for way, why in absent.items()}
        ours = facts["ways"][OURS]
        for way in facts["ways"].values():
            if "ms" in way:
                way["rate"] = facts["necessary"] / (way["ms"] / 1000)  # bytes or FLOPs a second
                way["of_machine"] = way["rate"] / machine[case.unit]
                way["times_ours"] = way["ms"] / ours["ms"] if "ms" in ours else None
    return {"kernel": case.name, "unit": case.unit, "tolerance": case.tolerance, "passes": passes}


def _way(
    case: Case, function: Function, expected: list[Tensor], device: torch.device, passes: dict[str, Any]
) -> dict[str, dict[str, Any]]:
    first, second = results(case, function), results(case, function)
    worst = max((error(a, b) for a, b in zip(first, expected, strict=True)), default=0.0)
    checked = {
        "error": worst if math.isfinite(worst) else None,
        "right": worst <= case.tolerance,
        "repeats": all(torch.equal(a, b) for a, b in zip(first, second, strict=True)),
    }
    del first, second
    found = {}
    for name in passes:
        taken = measure(_call(case, function, name), device)
        found[name] = checked | {
            "ms": taken.seconds * 1000,
            "fastest_ms": taken.fastest * 1000,
            "host_ms": taken.host_seconds * 1000,
            "peak_gib": None if taken.peak_bytes is None else taken.peak_bytes / GIB,
        }
    return found


def results(case: Case, function: Function, dtype: torch.dtype | None = None) -> list[Tensor]:
    """Outputs and gradients of the leaves, which are taken in `dtype` if one is given."""
    leaves = [leaf.detach().to(dtype or leaf.dtype).requires_grad_() for leaf in case.leaves]
    outputs = function(*leaves)
    kept = [out.detach() for out in outputs]
    if not case.differentiable:
        return kept
    wanted, gradients = _weighted(case, outputs)
    return kept + list(torch.autograd.grad(wanted, leaves, gradients))


def _weighted(case: Case, outputs: tuple[Tensor, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The outputs to go back from, and random gradients for them, always the same."""
    generator = torch.Generator().manual_seed(1)
    wanted = list(outputs[: case.differentiable])
    return wanted, [_random(out, generator) for out in wanted]


def _random(out: Tensor, generator: torch.Generator) -> Tensor:
    if out.dim() < 2:
        return torch.ones_like(out)
    row = torch.randn(
        out.shape[1], generator=generator
    )  # one row on the CPU: whole ones would take longer than kernels
    sign = torch.arange(out.shape[0], device=out.device) % 3 - 1
    return (row.to(out.device) * sign[:, None]).to(out.dtype)


def _call(case: Case, function: Function, name: str) -> Callable[[], Any]:
    leaves = case.leaves
    if name == "forward":
        return functools.partial(function, *leaves)
    if name == "backward":
        outputs, gradients = _weighted(case, function(*leaves))
        return lambda: torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
    return lambda: torch.autograd.grad(function(*leaves)[0], leaves)


def _said(problem: Exception) -> str:
    """An error in a few words."""
    if isinstance(problem, torch.OutOfMemoryError):
        return "out of memory"
    lines = [line.strip() for line in str(problem).splitlines() if line.strip()]
    return f"{type(problem).__name__}: {(lines or ['?'])[0]}"[:160]


def rate_text(unit: str, rate: float) -> str:
    """GB/s or TFLOP/s."""
    return f"{rate / 1e9:,.0f} GB/s" if unit == BYTES else f"{rate / 1e12:,.2f} TFLOP/s"
