"""What kernels.bench measures: for every kernel its inputs, the ways to compute it, and the work that is necessary.

Shapes: T tokens, D model width, F expert hidden width, E experts, K experts per token, V vocabulary, R = T K rows
(dropless), b bytes of an activation. Necessary is what has to cross the memory bus once, or be multiplied once:

    kernel          forward                                  backward
    router          4 T E + 12 T K bytes                     8 T E + 8 T K
    plan            16 T K                                   -
    permute         b (T + R) D + 4 R                        b (R + T) D + 4 R
    unpermute       b (R + T) D + 8 R                        b (T + 2 R) D + 12 R
    mixture         6 R D F FLOPs                            12 R D F
    experts         6 R D F                                  12 R D F
    cross-entropy   6 T D V, with its gradients

A kernel that recomputes, pads or reads twice does more than that, and is not paid for it. Weights are in the dtype of
the activations: the casts of a mixed-precision step are left out, for all ways alike.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import cross_entropy, permute, router
from kernels.bench_peers import liger_cross_entropy, missing_experts
from kernels.experts import experts, experts_reference, mixture
from kernels.sizes import SCALE, Size

OURS, REFERENCE, COMPILED = "ours", "reference", "torch.compile"
BYTES, FLOPS = "bytes", "flops"

Function = Callable[..., tuple[Tensor, ...]]


@dataclass
class Case:
    """One kernel. Functions take the leaves and return their outputs; gradients are of the first `differentiable`."""

    name: str
    unit: str  # BYTES or FLOPS
    forward: float  # necessary work
    backward: float  # 0: there is no backward pass of its own
    leaves: tuple[Tensor, ...]
    ways: dict[str, Function]  # OURS and REFERENCE among them
    exact: Function  # in float32 or on integers: what all are compared with
    tolerance: float
    differentiable: int = 1
    joint: bool = False  # gradients are made in the forward pass: measure both together, as `forward`
    compiled: Function | None = None  # what torch.compile is given, if not the reference
    absent: dict[str, str] = field(default_factory=dict)  # way -> why it cannot be measured


def cases(size: Size, tokens: int, dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    """All kernels at one number of tokens; inputs are random, made anew for each."""
    torch.manual_seed(0)
    rows, b = tokens * size.top_k, dtype.itemsize
    moved = b * (tokens + rows) * size.width + 4 * rows
    tolerance = 1e-4 if dtype == torch.float32 else 2e-2

    def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = dtype) -> Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype).requires_grad_()

    logits_TE = random(tokens, size.experts, dtype=torch.float32)
    bias_E = torch.randn(size.experts, device=device) * 0.1
    yield _router(logits_TE, bias_E, size.top_k)

    with torch.no_grad():
        routing = router.route_and_count(logits_TE, bias_E, size.top_k, SCALE)
    ids_TK, counts_E, places = routing.ids_TK, routing.counts_E, routing.places
    capacity = size.capacity(tokens)
    for name, plan_of in (
        ("plan", lambda places: permute.plan_dropless(ids_TK, counts_E, places)),
        ("plan, capacity", lambda places: permute.plan_capacity(ids_TK, counts_E, capacity, places)),
    ):
        ways: dict[str, Function] = {
            OURS: lambda plan_of=plan_of: plan_of(places)[:2],
            REFERENCE: lambda plan_of=plan_of: plan_of(None)[:2],
        }
        yield Case(name, BYTES, 16 * rows, 0, (), ways, ways[REFERENCE], 0.0, differentiable=0)

    plan = permute.plan_dropless(ids_TK, counts_E, places)
    index = plan.slot_R, plan.row_TK, plan.full
    x_TD = random(tokens, size.width)
    weights_TK = routing.weights_TK.detach().clone().requires_grad_()
    scatter: Function = lambda x: (permute._Permute.apply(x, *index),)  # noqa: E731
    ways = {OURS: lambda x: (permute.permute(x, plan),), REFERENCE: scatter}
    yield Case("permute", BYTES, moved, moved, (x_TD,), ways, scatter, tolerance)

    y_RD = random(rows, size.width)
    gather: Function = lambda y, w: (permute._Unpermute.apply(y, w, *index),)  # noqa: E731
    ways = {OURS: lambda y, w: (permute.unpermute(y, w, plan),), REFERENCE: gather}
    backward = b * (tokens + 2 * rows) * size.width + 12 * rows
    yield Case("unpermute", BYTES, moved + 4 * rows, backward, (y_RD, weights_TK), ways, gather, tolerance)
    del y_RD

    gate_up = random(size.experts, size.width, 2 * size.hidden, scale=size.width**-0.5)
    down = random(size.experts, size.hidden, size.width, scale=size.hidden**-0.5)
    flops = 6.0 * rows * size.width * size.hidden
    yield _mixture((x_TD, weights_TK, gate_up, down), plan, counts_E, flops, tolerance)
    x_RD = permute.permute(x_TD.detach(), plan).requires_grad_()
    yield _experts((x_RD, gate_up, down), counts_E, flops, tolerance)
    del gate_up, down, x_RD

    labels_N = torch.randint(size.classes, (tokens,), device=device)
    labels_N[::16] = cross_entropy.IGNORE
    head_VD = random(size.classes, size.width, scale=size.width**-0.5)
    yield _cross_entropy(x_TD, head_VD, labels_N, 6.0 * tokens * size.width * size.classes, tolerance)


def _router(logits_TE: Tensor, bias_E: Tensor, top_k: int) -> Case:
    tokens, experts_ = logits_TE.shape

    def ours(logits: Tensor) -> tuple[Tensor, ...]:
        found = router.route_and_count(logits, bias_E, top_k, SCALE)
        return found.weights_TK, found.z_loss_sum, found.counts_E, found.entropy_sum

    def reference(logits: Tensor) -> tuple[Tensor, ...]:
        ids_TK, weights_TK = router.route(logits, bias_E, top_k, SCALE)
        counts_E = torch.bincount(ids_TK.flatten(), minlength=experts_)
        return weights_TK, router.z_loss_sum(logits), counts_E, router.entropy_sum(logits)

    forward, backward = 4 * tokens * experts_ + 12 * tokens * top_k, 8 * tokens * (experts_ + top_k)
    ways = {OURS: ours, REFERENCE: reference}
    # Scores that differ in the last bit can change the order of two experts: a few tokens of many thousand.
    return Case("router", BYTES, forward, backward, (logits_TE,), ways, reference, 1e-2, differentiable=2)


def _mixture(leaves: tuple[Tensor, ...], plan: permute.Plan, counts_E: Tensor, flops: float, tolerance: float) -> Case:
    index = plan.slot_R, plan.row_TK, plan.full

    def around(mlp: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Function:
        def function(x: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
            y_RD = mlp(permute._Permute.apply(x, *index), gate_up, down)
            return (permute._Unpermute.apply(y_RD, weights, *index),)

        return function

    grouped = around(lambda x, gate_up, down: _grouped_mm(x, gate_up, down, counts_E))
    loop = around(lambda x, gate_up, down: experts_reference(x, gate_up, down, counts_E))
    ways: dict[str, Function] = {
        OURS: lambda x, w, gate_up, down: (mixture(x, w, plan, counts_E, gate_up, down),),
        REFERENCE: loop,
        "F.grouped_mm": grouped,
    }
    case = Case("mixture", FLOPS, flops, 2 * flops, leaves, ways, loop, tolerance, compiled=grouped)
    case.absent |= missing_experts()
    return case


def _experts(leaves: tuple[Tensor, ...], counts_E: Tensor, flops: float, tolerance: float) -> Case:
    def grouped(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return (_grouped_mm(x, gate_up, down, counts_E),)

    def loop(x: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, ...]:
        return (experts_reference(x, gate_up, down, counts_E),)

    ways: dict[str, Function] = {
        OURS: lambda x, gate_up, down: (experts(x, gate_up, down, counts_E),),
        REFERENCE: loop,
        "F.grouped_mm": grouped,
    }
    return Case("experts", FLOPS, flops, 2 * flops, leaves, ways, loop, tolerance, compiled=grouped)


def _grouped_mm(x_RD: Tensor, gate_up: Tensor, down: Tensor, counts_E: Tensor) -> Tensor:
    """torch's own grouped matrix product, with nothing around it."""
    ends_E = counts_E.cumsum(0).to(torch.int32)
    gate, up = F.grouped_mm(x_RD, gate_up, offs=ends_E).chunk(2, dim=-1)
    return F.grouped_mm(F.silu(gate) * up, down, offs=ends_E)


def _cross_entropy(hidden_ND: Tensor, head_VD: Tensor, labels_N: Tensor, flops: float, tolerance: float) -> Case:
    def whole(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        return (cross_entropy.linear_cross_entropy_reference(hidden, head, labels_N),)

    def in_chunks(hidden: Tensor, head: Tensor) -> tuple[Tensor, ...]:
        return (cross_entropy._LinearCrossEntropy.apply(hidden, head, head.detach(), labels_N),)

    ways: dict[str, Function] = {
        OURS: lambda hidden, head: (cross_entropy.linear_cross_entropy(hidden, head, labels_N),),
        REFERENCE: whole,
        "torch, chunked": in_chunks,
    }
    case = Case("cross-entropy", FLOPS, flops, 0, (hidden_ND, head_VD), ways, in_chunks, tolerance, joint=True)
    liger: Any = liger_cross_entropy(labels_N, head_VD.shape[0], head_VD.shape[1])
    if callable(liger):
        case.ways["Liger"] = liger
    else:
        case.absent["Liger"] = liger
    return case
