"""Line charts of training stages as inline SVG, drawn by matplotlib.

They are drawn in placeholder colours that become CSS variables, and their text stays text: one drawing serves the light
and the dark page and takes the page's font. Every chart has one panel a stage, side by side on a common scale, because
stages differ in length by orders of magnitude.
"""

import html
import io
import math
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from mm_train.log_lines import short
from mm_train.run_folder import Series, Stage

# Placeholder -> CSS variable of the page.
INK, SOFT, RULE = "#0a0b01", "#0a0b02", "#0a0b03"
SERIES = tuple(f"#0a0b1{index}" for index in range(8))
TROUBLE = SERIES[5]
VARIABLES = {INK: "--ink", SOFT: "--soft", RULE: "--rule"} | {colour: f"--c{i}" for i, colour in enumerate(SERIES)}

WIDE, NARROW = (920, 330), (440, 210)  # CSS pixels

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "report",  # the same run gives the same page
    "text.parse_math": False,
    "font.size": 11,
    "text.color": INK,
    "figure.facecolor": "none",
    "axes.facecolor": "none",
    "axes.edgecolor": RULE,
    "axes.labelcolor": SOFT,
    "axes.titlecolor": SOFT,
    "axes.titlesize": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.spines.left": False,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "grid.color": RULE,
    "lines.linewidth": 1.7,
    "lines.markersize": 4,
    "xtick.color": RULE,
    "xtick.labelcolor": SOFT,
    "ytick.color": RULE,
    "ytick.labelcolor": SOFT,
    "ytick.major.size": 0,
}


def source_colour(index: int) -> str:
    """The CSS colour of the n-th held-out source."""
    return f"var({VARIABLES[SERIES[index % len(SERIES)]]})"


def loss_chart(stages: list[Stage], sources: list[str]) -> str:
    """Training loss and the held-out loss of every source, in nats per token."""
    with panels(stages, WIDE) as (figure, axes):
        for stage, axis in zip(stages, axes, strict=True):
            mark_events(axis, stage)
            axis.plot(*stage.series("loss"), color=SOFT, linewidth=1.1)
            for index, source in enumerate(sources):
                plot_held_out(axis, stage.held_out(source, "loss"), SERIES[index % len(SERIES)])
        return as_svg(figure, "Training and held-out loss of each stage, in nats per token")


def plot_held_out(axis: Axes, series: Series, colour: str) -> None:
    """Few points, the last of them on the border of the panel, and all to be seen whole."""
    if series[0]:
        axis.plot(*series, color=colour, marker="o", clip_on=False)


def bits_chart(stages: list[Stage], sources: list[str], source: str, baselines: dict[str, float]) -> str:
    """Held-out bits per byte of one source, with a line for each baseline (label -> bits per byte)."""
    colour = SERIES[sources.index(source) % len(SERIES)]
    with panels(stages, NARROW) as (figure, axes):
        for stage, axis in zip(stages, axes, strict=True):
            plot_held_out(axis, stage.held_out(source, "bits_per_byte"), colour)
            for bits in baselines.values():
                axis.axhline(bits, color=SOFT, linewidth=1.1, dashes=(4, 3))
        for label, bits in baselines.items():
            place, note = axes[-1].get_yaxis_transform(), f"{label.split()[0]} {bits:.2f}"
            axes[-1].annotate(note, (1, bits), (6, 0), place, "offset points", color=SOFT, va="center")
        values = [bits for stage in stages for bits in stage.held_out(source, "bits_per_byte")[1]]
        axes[0].set_ylim(0, 1.12 * max([*values, *baselines.values()]))
        return as_svg(figure, f"Held-out bits per byte of {source} in each stage")


def mark_events(axis: Axes, stage: Stage) -> None:
    """A dotted line where a new process took over or one stopped, a dashed one for anything worse."""
    for event in stage.events:
        calm = event.kind in ("resumed", "stopped")
        axis.axvline(
            stage.tokens_after(event.step),
            color=SOFT if calm else TROUBLE,
            linewidth=0.9,
            dashes=(1, 2) if calm else (4, 2),
            zorder=0.5,
        )


def load_cell(layer: int, column: int, load: float, what: str) -> str:
    """One cell of a load map: `load` times the mean; half of it is cold and twice the mean hot, both fully opaque.

    `what` says what a column is.
    """
    heat = math.log2(min(max(load, 0.5), 2.0))
    colour = "--hot" if heat > 0 else "--cold"
    return (
        f'<rect x="{column}" y="{layer}" width="1" height="1" fill="var({colour})" fill-opacity="{abs(heat):.2f}">'
        f"<title>layer {layer}, {what} {column}: {load:.2f}x</title></rect>"
    )


def score_bar(score: float, stderr: float | None, chance: float | None) -> str:
    """A benchmark score from 0 to 1 as a bar with a whisker of one standard error and a tick at chance."""
    low, high = max(score - (stderr or 0), 0), min(score + (stderr or 0), 1)
    shapes = [
        '<rect y="8" width="100%" height="2" fill="var(--faint)"/>',
        f'<rect y="5" width="{score:.2%}" height="8" rx="2" fill="var(--c0)" fill-opacity=".55"/>',
        f'<rect x="{low:.2%}" y="8" width="{high - low:.2%}" height="2" fill="var(--ink)"/>',
    ]
    if chance:
        shapes.append(f'<rect x="{chance:.2%}" y="0" width="2" height="18" fill="var(--c1)"/>')
    return f"<svg>{''.join(shapes)}</svg>"


@contextmanager
def panels(stages: Sequence[Stage], size: tuple[int, int]) -> Iterator[tuple[Figure, list[Axes]]]:
    """A figure of `size` CSS pixels with a titled panel for each stage; longer stages get wider panels."""
    total = sum(stage.tokens for stage in stages) or 1
    with mpl.rc_context(STYLE):  # type: ignore[arg-type]
        figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")  # SVG counts 72 to the inch
        figure.get_layout_engine().set(w_pad=0.03, wspace=0.02)  # type: ignore[union-attr,call-arg]
        grid = figure.subplots(
            1, len(stages), sharey=True, squeeze=False, width_ratios=[s.tokens / total + 0.3 for s in stages]
        )
        axes = list(grid[0])
        for stage, axis in zip(stages, axes, strict=True):
            axis.set_title(stage.name, loc="left")
            axis.set_xlim(0, stage.tokens or 1)
            axis.set_xticks([stage.tokens], [f"{short(stage.tokens)}"], ha="right")
        yield figure, axes


def as_svg(figure: Figure, description: str) -> str:
    """The figure as an SVG element that scales with its box and is coloured by the page."""
    buffer = io.StringIO()
    FigureCanvasSVG(figure).print_svg(buffer, metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r' id="(?:figure|axes|patch|line2d|text|matplotlib|xtick|ytick|FillBetween)[^"]*"', "", svg)
    svg = re.sub(r"<!--.*?-->", "", svg)
    svg = re.sub(r' (?:width|height)="[\d.]+pt"', "", svg)
    svg = re.sub(r"font: (?:[\w ]*?)([\d.]+px) [^;\"]*", r"font-size: \1", svg)
    for colour, variable in VARIABLES.items():
        svg = svg.replace(colour, f"var({variable})")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(description)}" ', 1)
