"""The panels of mm_train.dashboard as charts of the report, from what a run folder holds."""

from collections.abc import Iterator
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, PercentFormatter

from mm_train.dashboard import SECTIONS, Panel, Section
from mm_train.log_lines import load_factors, short
from mm_train.report_charts import NARROW, SERIES, SOFT, VARIABLES, as_svg, mark_events, panels
from mm_train.run_folder import Series, Stage

ELSEWHERE = ("Loss", "Held-out bits per byte")  # panels that the page shows larger, in parts of their own
POINTS = 400  # of a line, at most
COLUMNS = 60  # of a map over time, at most


@dataclass(frozen=True)
class Chart:
    """A panel as drawn."""

    panel: Panel
    legend: list[tuple[str, str]]  # label, CSS colour; empty for a single line or one line a layer
    svg: str


def drawn_sections(stages: list[Stage]) -> Iterator[tuple[Section, list[Chart]]]:
    """Every section with the charts of those panels for which something was recorded, if there are any."""
    for section in SECTIONS:
        charts = [draw(stages, panel) for panel in section.panels if panel.title not in ELSEWHERE]
        if found := [chart for chart in charts if chart is not None]:
            yield section, found


def draw(stages: list[Stage], panel: Panel) -> Chart | None:
    """One panel with every stage side by side; None when nothing was recorded for it."""
    found = [stage.matching(panel.metrics) for stage in stages]
    names = list(dict.fromkeys(name for series in found for name in series))
    if not names:
        return None
    layers = any("layer_*" in metric for metric in panel.metrics)
    colours = {name: SERIES[0 if layers else index % len(SERIES)] for index, name in enumerate(names)}
    with panels(stages, NARROW) as (figure, axes):
        for stage, series, axis in zip(stages, found, axes, strict=True):
            mark_events(axis, stage)
            if panel.stacked:
                stack(axis, series, colours)
                continue
            width, alpha = (1.1, 0.7) if layers else (1.7, 1.0)
            for name, points in series.items():
                marker = "o" if len(points[0]) == 1 else None  # a line of one point is invisible
                axis.plot(*thinned(points), color=colours[name], marker=marker, linewidth=width, alpha=alpha)
            if panel.metrics == ("data/*",):
                for source, share in (stage.facts.get("data_mixture") or {}).items():
                    axis.axhline(share, color=colours.get(f"data/{source}", SOFT), linewidth=1.1, dashes=(4, 3))
        scale(axes[0], panel, [y for series in found for _, values in series.values() for y in values])
        svg = as_svg(figure, f"{panel.title} in each stage")
    labelled = [] if layers or len(names) == 1 else list(zip(labels(names), names, strict=True))
    return Chart(panel, [(label, f"var({VARIABLES[colours[name]]})") for label, name in labelled], svg)


def scale(axis: Axes, panel: Panel, values: list[float]) -> None:
    """Limits and numbers of the common y axis."""
    if panel.logarithmic:
        peak = max(values) or 1.0
        axis.set_yscale("log")
        axis.set_ylim(peak * 1e-4, peak * 2)
    elif panel.from_zero:
        axis.set_ylim(bottom=0)
    if panel.percent:
        axis.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=None))
    else:
        axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value) or ""))


def stack(axis: Axes, series: dict[str, Series], colours: dict[str, str]) -> None:
    """Values upon each other, in the order of `series`; what is missing at a point counts as 0."""
    places = sorted({x for xs, _ in series.values() for x in xs})
    every = max(1, len(places) // POINTS)
    places = places[::every]
    below = [0.0] * len(places)
    for name, (xs, ys) in series.items():
        value_at = dict(zip(xs, ys, strict=True))
        above = [low + value_at.get(x, 0.0) for low, x in zip(below, places, strict=True)]
        axis.fill_between(places, below, above, color=colours[name], alpha=0.75, linewidth=0)
        below = above


def thinned(series: Series) -> Series:
    """At most POINTS points that look the same: the lowest and the highest of every stretch."""
    xs, ys = series
    if len(xs) <= POINTS:
        return series
    width = -(-2 * len(xs) // POINTS)
    kept: list[int] = []
    for first in range(0, len(xs), width):
        stretch = range(first, min(first + width, len(xs)))
        kept += sorted({min(stretch, key=ys.__getitem__), max(stretch, key=ys.__getitem__)})
    return [xs[i] for i in kept], [ys[i] for i in kept]


def labels(names: list[str]) -> list[str]:
    """Names without the parts that all of them share at the beginning and the end."""
    parts = [name.split("/") for name in names]
    while all(len(p) > 1 for p in parts) and len({p[0] for p in parts}) == 1:
        parts = [p[1:] for p in parts]
    while all(len(p) > 1 for p in parts) and len({p[-1] for p in parts}) == 1:
        parts = [p[:-1] for p in parts]
    return ["/".join(p).replace("_", " ") for p in parts]


def load_history(stage: Stage) -> list[list[float]]:
    """For each layer, times the mean that its busiest expert got, over at most COLUMNS stretches of the stage."""
    factors = [load_factors(record["expert_load"]) for record in stage.train if record.get("expert_load")]
    width = max(1, -(-len(factors) // COLUMNS))
    stretches = [factors[first : first + width] for first in range(0, len(factors), width)]
    columns = [[max(layer) for layer in zip(*stretch, strict=True)] for stretch in stretches]
    return [list(layer) for layer in zip(*columns, strict=True)]
