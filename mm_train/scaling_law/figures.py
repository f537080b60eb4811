"""The figures of a fit: loss against N, D and E, isoFLOP curves, memory against FLOPs at equal loss. Torch-free."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes

from mm_train.log_lines import short
from mm_train.scaling_law.charts import INK, SOFT, chart, colour, logarithmic
from mm_train.scaling_law.law import Array, Law
from mm_train.scaling_law.runs import Runs

if TYPE_CHECKING:
    from mm_train.scaling_law.fit import Fitted

BITS = 4.5  # of a weight in the int4 format: 4, and a 16-bit scale for 32 of them


def draw(fits: "Sequence[Fitted]", folder: Path) -> list[str]:
    """Write all figures into a folder; their names."""
    names = []
    for index, fitted in enumerate(fits):
        stem = "" if len(fits) == 1 else f"{index}-" + fitted.label.replace(" ", "-") + "-"
        law, runs = fitted.law, fitted.runs
        drawings = {"loss.svg": _losses, "isoflop.svg": _isoflop}
        if len(law.expansions) > 1:
            drawings["pareto.svg"] = _pareto
        for name, drawing in drawings.items():
            drawing(law, runs, folder / (stem + name), fitted.label)
            names.append(stem + name)
    return names


def _losses(law: Law, runs: Runs, path: Path, label: str) -> None:
    """Measured points and the law through them. Points of other values of the third variable are left out."""
    by_expansion = len(law.expansions) > 1
    with chart(path, 2 + by_expansion, f"{label}: {law.source}, RMSE {law.rmse:.4f}") as axes:
        for axis, column, other in ((axes[0], "active_params", "tokens"), (axes[1], "tokens", "active_params")):
            at = _middle(getattr(runs, other))
            axis.set_title(f"at {'D' if other == 'tokens' else 'N'} = {short(at)}")
            for expansion in law.expansions:
                low, high = getattr(law, column)
                line = np.geomspace(low, high, 100)
                active, tokens = (line, at) if column == "active_params" else (at, line)
                tint = colour(expansion, law.expansions)
                axis.plot(line, law.loss(active, tokens, expansion), color=tint, label=f"E = {expansion}")
                _band(axis, line, law.loss_draws(active, tokens, expansion), tint)
                these = runs.where((getattr(runs, other) == at) & (np.round(runs.expansion) == expansion))
                axis.plot(getattr(these, column), these.loss, "o", color=tint)
            words = "active parameters N" if column == "active_params" else "training tokens D"
            logarithmic(axis, words)
        axes[0].legend()
        if by_expansion:
            at = _middle(runs.tokens)
            axes[2].set_title(f"at D = {short(at)}")
            line = np.geomspace(min(law.expansions), max(law.expansions), 100)
            sizes = runs.values("active_params")
            chosen = sorted({sizes[0], sizes[len(sizes) // 2], sizes[-1]})
            for index, size in enumerate(chosen):
                tint = (SOFT, "#4e79a7", "#d1495b")[index % 3]
                axes[2].plot(line, law.loss(size, at, line), color=tint, label=f"N = {short(size)}")
                these = runs.where((runs.tokens == at) & (runs.active_params == size))
                axes[2].plot(these.expansion, these.loss, "o", color=tint)
            logarithmic(axes[2], "expansion E")
            axes[2].set_xticks(law.expansions, [str(e) for e in law.expansions])
            axes[2].minorticks_off()
            axes[2].legend()


def _band(axis: Axes, line: Array, draws: Array, tint: str) -> None:
    """Where 95 % of the bootstrap's laws lie."""
    if len(draws) > 1:
        low, high = np.quantile(draws, (0.025, 0.975), axis=0)
        axis.fill_between(line, low, high, color=tint, alpha=0.15, linewidth=0)


def _isoflop(law: Law, runs: Runs, path: Path, label: str) -> None:
    """Loss against N where 6 N D is the same: as far as D stays among the runs' it is a solid line."""
    flops = 6 * runs.active_params * runs.tokens
    budgets = np.geomspace(flops.min(), flops.max(), 5)[1:-1]
    expansions = [law.expansions[0], law.expansions[-1]] if len(law.expansions) > 2 else list(law.expansions)
    if 8 in law.expansions:
        expansions = [law.expansions[0], 8] if law.expansions[0] != 8 else [8]
    with chart(path, len(expansions), f"{label}: equal training FLOPs; dashed: D outside the runs") as axes:
        for axis, expansion in zip(axes, expansions, strict=True):
            axis.set_title(f"E = {expansion}")
            size = np.geomspace(law.active_params[0] / 2, law.active_params[1] * 2, 200)
            for index, budget in enumerate(budgets):
                tokens = budget / (6 * size)
                loss = law.loss(size, tokens, expansion)
                inside = (tokens >= law.tokens[0]) & (tokens <= law.tokens[1])
                tint = ("#4e79a7", "#d1495b", "#3a7d44")[index]
                axis.plot(size, loss, "--", color=tint, linewidth=0.8)
                axis.plot(np.where(inside, size, np.nan), loss, color=tint, label=f"{budget:.2g} FLOP")
                axis.plot(size[loss.argmin()], loss.min(), "o", color=tint)
            axis.axvspan(*law.active_params, color=INK, alpha=0.05, linewidth=0)
            logarithmic(axis, "active parameters N")
            axis.legend()


def _pareto(law: Law, runs: Runs, path: Path, label: str) -> None:
    """Equal loss: more experts are fewer FLOPs a token and more memory. Total parameters are those of the runs."""
    at = _middle(runs.tokens)
    curves = {}
    for expansion in law.expansions:
        these = runs.where(np.round(runs.expansion) == expansion)
        active, first = np.unique(these.active_params, return_index=True)
        if len(active) > 1:
            size = np.geomspace(active[0], active[-1], 200)
            total = np.exp(np.interp(np.log(size), np.log(active), np.log(these.total_params[first])))
            curves[expansion] = (2 * size, total * BITS / 8, law.loss(size, at, expansion))
    with chart(path, 1, f"{label}: equal loss at D = {short(at)}") as (axis,):
        for expansion, (flops, memory, _) in curves.items():
            axis.plot(flops, memory, color=colour(expansion, law.expansions), linewidth=0.9, label=f"E = {expansion}")
        for target in _targets([loss for _, _, loss in curves.values()]):
            points = [
                (np.interp(-target, -loss, flops), np.interp(-target, -loss, memory))
                for flops, memory, loss in curves.values()
                if loss.min() <= target <= loss.max()
            ]
            if len(points) > 1:
                axis.plot(*zip(*points, strict=True), "o-", color=INK, linewidth=1)
                axis.annotate(f" {target:.3f}", points[-1], color=INK, fontsize=8)
        logarithmic(axis, "inference FLOPs a token, 2 N", "int4 weights, bytes", both=True)
        if curves:
            axis.legend(loc="center left", bbox_to_anchor=(1, 0.5))


def _targets(losses: Sequence[Array]) -> Array:
    """Four losses that the most expansions can have."""
    if not losses:
        return np.array([])
    low, high = max(loss.min() for loss in losses), min(loss.max() for loss in losses)
    if low >= high:
        low, high = min(loss.min() for loss in losses), max(loss.max() for loss in losses)
    return np.linspace(low, high, 6)[1:-1]


def _middle(column: Array) -> float:
    """The middle one of the values that there are."""
    values = np.unique(column)
    return float(values[len(values) // 2])
