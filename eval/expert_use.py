"""Which benchmark uses which experts, as in the paper's appendix: experts.json, a heat map, how alike benchmarks are.

Torch-free; the figure needs matplotlib (the report extra).
"""

import html
import io
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

from eval.item_log import READ, SCORED, Used
from mm_train.files import write_atomic

FACTS, FIGURE = "experts.json", "experts.svg"
COLUMNS = 5  # panels side by side
RANGE = 2  # colours reach from 2**-RANGE to 2**RANGE times an even share


def facts(used: dict[str, Used], asked: dict[str, int], model: str, experts_per_token: int) -> dict[str, Any]:
    """All of experts.json, but for benchmarks without counts. `asked`: unequal requests of this evaluation."""
    names = [name for name in asked if name in used]
    shape = used[names[0]].counts.shape if names else (2, 0, 0)
    tasks = {}
    for name in names:
        counts = used[name].counts
        tasks[name] = {
            "requests": used[name].requests,
            "of": asked[name],
            "effective_experts": round(effective(counts[READ]), 2),
            **{
                kind: {"tokens": int(counts[which, 0].sum()) // experts_per_token, "counts": counts[which].tolist()}
                for kind, which in (("read", READ), ("scored", SCORED))
            },
        }
    shares = [share(used[name].counts[READ]) for name in names]
    return {
        "model": model,
        "layers": shape[1],
        "experts": shape[2],
        "experts_per_token": experts_per_token,
        "tasks": tasks,
        "similarity": [[round(overlap(a, b), 4) for b in shares] for a in shares],
    }


def share(counts_LE: Any) -> np.ndarray:
    """Of each layer's choices, the share that fell on each expert."""
    counts = np.asarray(counts_LE, dtype=float)
    return counts / counts.sum(1, keepdims=True)


def effective(counts_LE: Any) -> float:
    """How many experts, used evenly, would be as varied: e to the entropy, mean over the layers."""
    shares = share(counts_LE)
    logs = np.log(shares, where=shares > 0, out=np.zeros_like(shares))
    return float(np.exp(-(shares * logs).sum(1)).mean())


def overlap(first_LE: np.ndarray, second_LE: np.ndarray) -> float:
    """What two benchmarks have in common: 1 when they use all experts alike, 0 when they share none; by layer, mean."""
    return float(np.minimum(first_LE, second_LE).sum(1).mean())


def notes(found: dict[str, Any]) -> list[str]:
    """How to read the figure, and which counts are not of just the requests of this evaluation."""
    lines = [
        f"Every token of a benchmark's prompts, few-shot examples included, and of its choices takes "
        f"{found['experts_per_token']} of {found['experts']} experts in each of {found['layers']} layers. Red: an "
        "expert that is taken more often than evenly, blue: less often. Overlap: the share of what is taken that two "
        f"benchmarks have in common, mean over the layers. {FACTS} also has the tokens that answers depend on."
    ]
    for name, task in found["tasks"].items():
        if task["requests"] < task["of"]:
            lines.append(
                f"{name}: experts counted for {task['requests']} of {task['of']} requests; "
                "the others were answered before, without counts"
            )
        elif task["requests"] > task["of"]:
            lines.append(
                f"{name}: experts counted for {task['requests']} requests, those of earlier evaluations of the same "
                f"model into the same folder included; this one has {task['of']}"
            )
    return lines


def figure(found: dict[str, Any]) -> bytes:
    """SVG: benchmarks x experts of each layer, and the overlap of benchmarks. Raises ImportError without matplotlib."""
    import matplotlib as mpl
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    names = list(found["tasks"])
    shares = np.stack([share(found["tasks"][name]["read"]["counts"]) for name in names])  # [tasks, L, E]
    with np.errstate(divide="ignore"):
        times = np.log2(shares * found["experts"]).clip(-RANGE, RANGE)
    rows = math.ceil((found["layers"] + 1) / COLUMNS)
    style: dict[Any, Any] = {"svg.fonttype": "none", "svg.hashsalt": "experts", "font.size": 8}
    with mpl.rc_context(style):
        figure = Figure(figsize=(2.7 * COLUMNS + 1, (0.9 + 0.17 * len(names)) * rows + 0.6), layout="constrained")
        panels = figure.subplots(rows, COLUMNS, squeeze=False).flatten()
        for layer in range(found["layers"]):
            image = panels[layer].imshow(
                times[:, layer], aspect="auto", cmap="RdBu_r", vmin=-RANGE, vmax=RANGE, interpolation="nearest"
            )
            panels[layer].set_title(f"layer {layer}, by expert", fontsize=8, loc="left")
            panels[layer].xaxis.set_major_locator(MaxNLocator(integer=True))
        bar = figure.colorbar(image, ax=panels[: found["layers"]].tolist(), shrink=0.8, pad=0.01)
        bar.set_ticks(range(-RANGE, RANGE + 1), labels=[f"{2.0**tick:g}x" for tick in range(-RANGE, RANGE + 1)])
        bar.set_label("of an even share")
        last = panels[found["layers"]]
        grey = last.imshow(found["similarity"], aspect="auto", cmap="Greys", vmax=1, interpolation="nearest")
        last.set_title("overlap of benchmarks", fontsize=8, loc="left")
        last.set_xticks(range(len(names)), names, rotation=90, fontsize=6)
        figure.colorbar(grey, ax=last, shrink=0.8, pad=0.02)
        for index, panel in enumerate(panels):
            panel.tick_params(length=2)
            panel.set_visible(index <= found["layers"])
            shown = names if index % COLUMNS == 0 or index == found["layers"] else []
            panel.set_yticks(range(len(names)) if shown else [], shown)
        page = io.StringIO()
        FigureCanvasSVG(figure).print_svg(page, metadata={"Date": None})
    return page.getvalue().encode()


def write(out: Path, found: dict[str, Any]) -> None:
    """Write experts.json and experts.svg into `out`; remove those of an earlier evaluation when nothing was counted."""
    for name in (FACTS, FIGURE):
        (out / name).unlink(missing_ok=True)
    if not found["tasks"]:
        return
    write_atomic(out / FACTS, (json.dumps(found) + "\n").encode())
    try:
        write_atomic(out / FIGURE, figure(found))
    except ImportError as error:
        print(f"warning: no {FIGURE} ({error}): pip install -e '.[report]'", file=sys.stderr)


def section(out: Path) -> str:
    """HTML of what `write` has left in `out`, for results.html; empty when that is nothing."""
    if not (out / FACTS).is_file():
        return ""
    found = json.loads((out / FACTS).read_bytes())
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes(found))
    drawn = (out / FIGURE).read_text(encoding="utf-8") if (out / FIGURE).is_file() else ""
    return f"<h2>Which benchmark uses which experts</h2>{drawn[drawn.find('<svg') :] if drawn else ''}{below}"
