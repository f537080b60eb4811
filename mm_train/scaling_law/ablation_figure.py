"""The figure of an ablation: loss against expansion, against granularity, and what single choices are worth."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mm_train.scaling_law.ablation import Setting, difference

STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ablation",  # the same runs give the same bytes
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#dddddd",
}
LINE, POINT, BAR = "#1f5fa8", "#8fb3dc", "#c0582b"


def draw(settings: Sequence[Setting], reference: Setting) -> bytes:
    """SVG of three panels."""
    expansion, granularity, shared, _ = reference.cell
    plain = [setting for setting in settings if not setting.cell[3]]
    by_expansion = [s for s in plain if s.cell[0] == 1 or s.cell[1:3] == (granularity, shared)]
    by_granularity = [s for s in plain if s.cell[0] == expansion and not s.cell[2]]
    single = [s for s in settings if s.cell[3] or s.cell[0] == 1 or s.cell[:2] == (expansion, granularity)]
    single.remove(reference)
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(11, 3.6), layout="constrained")
        left, middle, right = figure.subplots(1, 3)
        _curve(left, by_expansion, 0, "expansion E", "granularity and shared expert of the reference")
        _curve(middle, by_granularity, 1, "granularity g", f"E = {expansion}, no shared expert")
        left.set_ylabel("held-out loss, nats a token")
        _bars(right, single, reference)
        page = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(page, metadata={"Date": None})
    return page.getvalue()


def _curve(axes: Axes, settings: Sequence[Setting], index: int, name: str, title: str) -> None:
    """Mean over seeds as a line, every seed as a point, on a logarithmic axis with base 2."""
    ordered = sorted(settings, key=lambda s: s.cell[index])
    for setting in ordered:
        losses = list(setting.losses.values())
        axes.plot([setting.cell[index]] * len(losses), losses, "o", color=POINT, markersize=4)
    axes.plot([s.cell[index] for s in ordered], [s.mean for s in ordered], "o-", color=LINE, markersize=5)
    axes.set_xscale("log", base=2)
    axes.set_xticks([s.cell[index] for s in ordered], [str(s.cell[index]) for s in ordered])
    axes.minorticks_off()
    axes.set_xlabel(name)
    axes.set_title(title, fontsize=10)


def _bars(axes: Axes, settings: Sequence[Setting], reference: Setting) -> None:
    """Mean difference to the reference, every seed as a point."""
    for row, setting in enumerate(settings):
        against = difference(setting, reference)
        axes.barh(row, against.mean, height=0.6, color=BAR, alpha=0.55)
        axes.plot(against.by_seed, [row] * len(against.by_seed), "o", color=BAR, markersize=4)
    axes.set_yticks(range(len(settings)), [setting.label for setting in settings])
    axes.invert_yaxis()
    axes.axvline(0, color="#444444", linewidth=0.8)
    axes.set_xlabel("loss above the reference")
    axes.set_title(f"against {reference.label}", fontsize=10)
