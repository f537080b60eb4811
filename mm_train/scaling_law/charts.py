"""How the figures of the scaling law look, and how they are written. Needs matplotlib; torch-free."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mm_train.files import write_atomic

INK, SOFT, RULE = "#222222", "#666666", "#dddddd"
EXPANSIONS = ("#777777", "#b07aa1", "#4e79a7", "#d1495b", "#edae49", "#3a7d44", "#00798c", "#8d5b4c")
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "scaling law",  # the same numbers give the same file
    "font.size": 10,
    "axes.edgecolor": SOFT,
    "axes.labelcolor": INK,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.6,
    "lines.markersize": 4,
    "legend.frameon": False,
    "legend.fontsize": 9,
}


def colour(expansion: float, expansions: Sequence[float]) -> str:
    """The colour of an expansion among all that are drawn."""
    return EXPANSIONS[list(expansions).index(expansion) % len(EXPANSIONS)]


@contextmanager
def chart(path: Path, panels: int = 1, title: str = "") -> Iterator[list[Axes]]:
    """Axes side by side, written to `path` as SVG at the end, whole or not at all."""
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(1.2 + 4.6 * panels, 4.2), layout="constrained")
        axes = list(figure.subplots(1, panels, squeeze=False)[0])
        figure.suptitle(title, fontsize=11, x=0.01, ha="left")
        yield axes
        buffer = io.StringIO()
        FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None})
    write_atomic(path, buffer.getvalue().encode())


def logarithmic(axis: Axes, x: str, y: str = "loss, nats per token", both: bool = False) -> None:
    """A logarithmic x axis, and y as well if `both`, with their labels."""
    axis.set_xscale("log")
    if both:
        axis.set_yscale("log")
    axis.set_xlabel(x)
    axis.set_ylabel(y)
