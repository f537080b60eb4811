"""The result of eval.profile as a table and a figure."""

import io
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

MEASURES = {"prefill": "prefill, tokens/s", "decode": "decode, tokens/s", "first_token": "first token, s"}


@dataclass
class Profile:
    """What was measured."""

    machine: str
    threads: int
    bandwidth: float  # bytes a second that memory can be read with
    baseline: str
    models: dict[str, dict[str, int]]  # file_bytes, active_bytes (of weights, a token), kv_bytes (a token of context)
    rows: list[dict[str, Any]]  # one a repeat, prompt and model

    def median(self, model: str, context: int, kind: str, measure: str) -> float:
        """Over the repeats; nan when it was not measured."""
        found = [
            row[measure]
            for row in self.rows
            if (row["model"], row["context"], row["kind"]) == (model, context, kind) and measure in row
        ]
        return statistics.median(found) if found else float("nan")

    def ratio(self, model: str, context: int, kind: str, measure: str) -> float:
        """How many times the baseline's: the median of the ratios within repeats."""
        values: dict[str, dict[int, float]] = {model: {}, self.baseline: {}}
        for row in self.rows:
            if row["model"] in values and (row["context"], row["kind"]) == (context, kind) and measure in row:
                values[row["model"]][row["repeat"]] = row[measure]
        theirs = values[self.baseline]
        ratios = [value / theirs[repeat] for repeat, value in values[model].items() if repeat in theirs]
        return statistics.median(ratios) if ratios else float("nan")

    def of_bandwidth(self, model: str, context: int, kind: str) -> float:
        """Share of the memory bandwidth that decoding uses: weights of a token and the cache, once a token."""
        facts = self.models[model]
        size = facts["active_bytes"] + context * facts["kv_bytes"]
        return self.median(model, context, kind, "decode") * size / self.bandwidth

    def cells(self) -> Iterator[tuple[int, str, str]]:
        """(context, kind, model) in the order of the table."""
        seen = dict.fromkeys((row["context"], row["kind"]) for row in self.rows)
        for context, kind in sorted(seen):
            for model in self.models:
                yield context, kind, model

    def values(self) -> dict[str, Any]:
        """For JSON: what was measured, and the medians."""
        summary = []
        for context, kind, model in self.cells():
            medians = {key: self.median(model, context, kind, key) for key in (*MEASURES, "resident", "touched")}
            ratios = {f"{key}_ratio": self.ratio(model, context, kind, key) for key in MEASURES}
            facts = {"context": context, "kind": kind, "model": model}
            summary.append(facts | medians | ratios | {"of_bandwidth": self.of_bandwidth(model, context, kind)})
        return asdict(self) | {"summary": summary}


def table(profile: Profile) -> str:
    """Markdown."""
    lines = [
        f"{profile.machine}, {profile.threads} threads, memory read at {profile.bandwidth / 1e9:.1f} GB/s."
        f" Ratios: against {profile.baseline}, within repeats.",
        "",
        "| prompt | model | prefill, tokens/s | first token, s | decode, tokens/s | of bandwidth"
        " | resident, MB | touched, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for context, kind, model in profile.cells():
        cell = (model, context, kind)

        def with_ratio(key: str, digits: int, cell: tuple[str, int, str] = cell) -> str:
            text = f"{profile.median(*cell, key):,.{digits}f}"
            return text if cell[0] == profile.baseline else f"{text} ({profile.ratio(*cell, key):.2f}x)"

        lines.append(
            f"| {context} {kind} | {model} | {with_ratio('prefill', 1)} | {profile.median(*cell, 'first_token'):.2f}"
            f" | {with_ratio('decode', 1)} | {profile.of_bandwidth(*cell):.0%}"
            f" | {profile.median(*cell, 'resident') / 1e6:,.0f} | {profile.median(*cell, 'touched') / 1e6:,.0f} |"
        )
    return "\n".join(lines) + "\n"


def chart(profile: Profile) -> bytes:
    """SVG: bars of prefill and decode by context, for real prompts, and of touched bytes for both kinds of prompt."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "profile", "axes.spines.top": False}
    with mpl.rc_context(style | {"axes.spines.right": False, "font.size": 10}):
        figure = Figure(figsize=(11, 3.4), layout="constrained")
        panels = figure.subplots(1, 3)
        contexts = sorted({context for context, _, _ in profile.cells()})
        models = list(profile.models)
        width = 0.8 / len(models)
        for panel, key in zip(panels, ("prefill", "decode"), strict=False):
            for index, model in enumerate(models):
                heights = [profile.median(model, context, "real", key) for context in contexts]
                places = [place + (index - (len(models) - 1) / 2) * width for place in range(len(contexts))]
                panel.bar(places, heights, width * 0.92, label=model)
            panel.set_title(MEASURES[key], fontsize=10)
            panel.set_xticks(range(len(contexts)), [f"{context}" for context in contexts])
            panel.set_xlabel("prompt, tokens")
        panels[0].legend(frameon=False, fontsize=8)
        for index, model in enumerate(models):
            for kind, shade in (("repeated", 0.45), ("real", 1.0)):
                height = profile.median(model, contexts[-1], kind, "touched") / 1e6
                place = index + (0.2 if kind == "real" else -0.2)
                panels[2].bar(place, height, 0.38, color=f"C{index}", alpha=shade)
        panels[2].set_xticks(range(len(models)), models, fontsize=8)
        panels[2].set_title(f"MB of weights touched, {contexts[-1]} tokens: repeated (pale), real", fontsize=10)
        page = io.BytesIO()
        FigureCanvasSVG(figure).print_svg(page, metadata={"Date": None})
    return page.getvalue()
