"""The figures of a plan: loss over N at its training FLOPs, and over D beyond the range of the fit. Torch-free."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mm_train.scaling_law.charts import INK, SOFT, chart, colour, logarithmic
from mm_train.scaling_law.law import Law
from mm_train.scaling_law.plan_text import short
from mm_train.scaling_law.solve import Budget, Row


def draw(folder: Path, law: Law, budget: Budget, rows: Sequence[Row], best: Row) -> list[str]:
    """Write both into a folder; their names."""
    _budget(folder / "plan.svg", law, budget, rows, best)
    _range(folder / "range.svg", law, rows, best)
    return ["plan.svg", "range.svg"]


def _budget(path: Path, law: Law, budget: Budget, rows: Sequence[Row], best: Row) -> None:
    """Left: loss over N where tokens follow from the FLOPs. Right: what each expansion's network costs in memory."""
    expansions = [row.option.expansion for row in rows]
    with chart(path, 2, f"{budget.train_flops:.3g} training FLOPs, {short(budget.memory / 2**30)} GiB") as (
        left,
        right,
    ):
        lowest, highest = law.active_params
        active = np.geomspace(min(lowest, best.option.active) / 2, max(highest, best.option.active) * 2, 300)
        tokens = np.minimum(budget.train_flops / (6 * active), budget.tokens_max)
        inside = (tokens >= law.tokens[0]) & (tokens <= law.tokens[1])
        for row in rows:
            option = row.option
            tint = colour(option.expansion, expansions)
            loss = law.loss(active, tokens, option.expansion)
            left.plot(active, loss, "--", color=tint, linewidth=0.7)
            left.plot(np.where(inside, active, np.nan), loss, color=tint, label=f"E = {option.expansion}")
            left.plot(option.active, option.loss, "o", color=tint)
            right.plot(option.memory / 2**30, option.loss, "o", color=tint, markersize=6)
            right.annotate(f"  E = {option.expansion}", (option.memory / 2**30, option.loss), color=tint, va="center")
        left.plot(best.option.active, best.option.loss, "o", color=INK, markersize=10, fillstyle="none")
        right.plot(best.option.memory / 2**30, best.option.loss, "o", color=INK, markersize=11, fillstyle="none")
        if budget.active_max < np.inf:
            left.axvline(budget.active_max, color=SOFT, linewidth=0.9, dashes=(4, 2))
        right.axvline(budget.memory / 2**30, color=SOFT, linewidth=0.9, dashes=(4, 2))
        left.set_title("dashed: D outside of the fit; ring: recommended")
        logarithmic(left, "active parameters N")
        left.legend()
        right.set_title("the best network of each expansion")
        right.set_xlabel("int4 file and int8 cache, GiB")
        right.set_ylabel("predicted loss, nats per token")


def _range(path: Path, law: Law, rows: Sequence[Row], best: Row) -> None:
    """How far behind the best each expansion is as D grows, at the plan's N: what the law was fitted to is shaded."""
    expansions = [row.option.expansion for row in rows]
    tokens = np.geomspace(law.tokens[0] / 3, max(law.tokens[1] * 20, best.option.tokens * 1.5), 300)
    losses = np.array([law.loss(best.option.active, tokens, expansion) for expansion in expansions])
    with chart(path, 1, f"regret at N = {short(best.option.active)}") as (axis,):
        for expansion, regret in zip(expansions, losses - losses.min(0), strict=True):
            axis.plot(tokens, regret, color=colour(expansion, expansions), label=f"E = {expansion}")
        axis.axvspan(*law.tokens, color=INK, alpha=0.07, linewidth=0)
        axis.axvline(best.option.tokens, color=SOFT, linewidth=0.9, dashes=(4, 2))
        axis.set_title("shaded: D of the fit; dashed: the plan's D")
        logarithmic(axis, "training tokens D", "loss above the best expansion")
        axis.set_ylim(0, None)
        axis.legend()
