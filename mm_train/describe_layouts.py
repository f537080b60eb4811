"""Which ways of sharing out a network fit a number of GPUs, what they send, and which one to take. Torch-free.

The layouts compared differ in expert parallel, ZeRO stage and recomputation; tensor parallelism, which sends most and
computes routed experts twice, is looked at when nothing else fits.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

from mm_train import costs, memory
from mm_train.cli import UserError
from mm_train.describe_plan import Plan

NODE = 8  # GPUs that are connected well enough to exchange tokens in every layer
PAPER = 4  # its expert parallel (arXiv 2605.27358)
KEYS = ("expert_parallel", "tensor_parallel", "zero_stage", "recompute")  # what tells layouts apart


def layouts(plan: Plan) -> list[dict[str, Any]]:
    """Facts of every sensible layout on the plan's GPUs, the plan's own among them if it is one."""
    found = list(_with_tensor_parallel(plan, 1))
    if not any(layout["fits"] for layout in found):
        found += _with_tensor_parallel(plan, 2)
    return found


def _with_tensor_parallel(
    plan: Plan, tensor_parallel: int, recomputes: Sequence[str] = ("none", "layer")
) -> Iterator[dict[str, Any]]:
    experts = plan.model.num_local_experts
    zero_stages = (0, 1, 2) if plan.layout.deepspeed else (plan.cfg.parallel.zero_stage,)
    for expert_parallel in range(1, NODE + 1 if experts else 2):
        for zero_stage in zero_stages:
            for recompute in recomputes:
                values = (expert_parallel, tensor_parallel, zero_stage, recompute)
                try:
                    there = plan.laid_out(*values)
                except UserError:  # the experts, the heads, the GPUs or the batch do not divide
                    continue
                used = memory.memory_bytes(there.model, there.layout)["total"] / memory.GIB
                yield {
                    **dict(zip(KEYS, values, strict=True)),
                    "memory_gib_total": used,
                    "fits": plan.fits(used),
                    "micro_steps": there.layout.micro_steps,
                    "comm_bytes_per_step_total": costs.communication(there.model, there.layout)["total"],
                }


def recommendation(plan: Plan, found: list[dict[str, Any]]) -> dict[str, Any]:
    """The keys of one of the layouts, or None for each when none fits, with "why" in words and what "paper" costs.

    Computing anything twice costs more than sending it, so layouts without recomputation and tensor parallelism come
    first, then those with all experts everywhere, which exchange no tokens, then the fewest bytes.
    """
    fitting = [layout for layout in found if layout["fits"]]
    if not fitting:
        best = dict.fromkeys(KEYS)
        why = f"nothing fits{_with_less(plan)}: more GPUs or larger ones are needed"
    else:
        best = min(fitting, key=_cost)
        why = _why(plan, best, found)
    return {key: best[key] for key in KEYS} | {"why": why, "paper": _paper(plan, found)}


def _cost(layout: dict[str, Any]) -> tuple:
    """Layouts in order of preference."""
    doubled = (layout["tensor_parallel"], layout["recompute"] == "layer")
    return (*doubled, layout["expert_parallel"] > 1, layout["comm_bytes_per_step_total"], layout["zero_stage"])


def _why(plan: Plan, best: dict[str, Any], found: list[dict[str, Any]]) -> str:
    reasons = []
    if best["tensor_parallel"] > 1:
        reasons.append("nothing fits without tensor parallelism")
    if best["recompute"] == "layer":
        reasons.append(f"nothing fits without recomputation{_with_less(plan)}")
    if best["expert_parallel"] > 1:
        with_it = any(layout["fits"] and layout["expert_parallel"] == 1 for layout in found)
        reasons.append(f"with all experts on every GPU nothing fits{' without recomputation' if with_it else ''}")
    elif plan.model.num_local_experts and plan.layout.gpus > 1:
        reasons.append("it fits with all experts on every GPU, so that no tokens are exchanged")
    if plan.layout.gpus == 1:
        reasons.append("one GPU sends nothing")
    else:
        alike = [layout for layout in found if layout["fits"] and _cost(layout)[:3] == _cost(best)[:3]]
        least = ", the fewest of those that fit" if len(alike) > 1 else ""
        reasons.append(f"{best['comm_bytes_per_step_total'] / memory.GIB:,.2f} GiB sent a step{least}")
    return "; ".join(reasons)


def _with_less(plan: Plan) -> str:
    """In words, the largest smaller micro-batch (by halves) with which something fits and nothing is computed twice."""

    def fits(rows: int) -> bool:
        smaller = replace(plan, cfg=replace(plan.cfg, train=replace(plan.cfg.train, micro_batch_size=rows)))
        return any(layout["fits"] for layout in _with_tensor_parallel(smaller, 1, ("none",)))

    rows = plan.cfg.train.micro_batch_size // 2
    if not rows or not fits(1):
        return ""
    while not fits(rows):
        rows //= 2
    return f" (with micro_batch_size={rows} it would)"


def _paper(plan: Plan, found: list[dict[str, Any]]) -> str | None:
    """The paper's expert parallel in words; None for a network without experts."""
    if not plan.model.num_local_experts:
        return None
    its = [layout for layout in found if layout["expert_parallel"] == PAPER]
    if not its:
        return f"expert_parallel={PAPER} is not possible here: it must divide the GPUs and the experts"
    best = min(its, key=lambda layout: (not layout["fits"], *_cost(layout)))
    how = f"zero_stage={best['zero_stage']} recompute={best['recompute']}"
    return (
        f"expert_parallel={PAPER} {how}: {best['memory_gib_total']:,.1f} GiB a GPU,"
        f" {'fits' if best['fits'] else 'does not fit'}, {best['comm_bytes_per_step_total'] / memory.GIB:,.2f} GiB sent"
        " a step"
    )
