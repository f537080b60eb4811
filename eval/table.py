"""Evaluation results for people: the aligned table on the terminal, results.md and results.html."""

import html
from typing import Any

Published = dict[str, dict[str, float]]  # percent by model: benchmarks' names and "average"

HEADER = ("benchmark", "shots", "metric", "items", "score", "95 % interval", "chance", "gold bpb")
STYLE = """body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 75rem; padding: 0 1rem;
color: #1d2733 }
table { border-collapse: collapse; font-variant-numeric: tabular-nums } th { font-weight: 600 }
th, td { padding: .3rem .8rem; text-align: right; border-bottom: 1px solid #dfe4ea } .left { text-align: left }
tr.none td { color: #8390a0 } .bar { width: 10rem } .bar div { background: #e8ecf1; position: relative; height: .8rem }
.bar i { background: #3b6fb6; height: 100%; display: block } .bar b { position: absolute; top: -.15rem; width: 2px;
height: 1.1rem; background: #c2571a } p { color: #4a5766; margin: .4rem 0 }
svg { max-width: 100%; height: auto } h2 { margin: 2rem 0 .4rem }"""


def columns(published: Published) -> list[str]:
    """The models that stand in columns of their own: those with a figure for single benchmarks."""
    return [model for model, scores in published.items() if set(scores) - {"average"}]


def rows(results: dict[str, Any], published: Published) -> list[tuple[str, ...]]:
    """One row a benchmark, and the average; percent with the standard error, * where a set is not complete."""
    models = columns(published)
    table: list[tuple[str, ...]] = []
    for name, task in results["tasks"].items():
        cells = ("", "", "", "", "")
        if task["status"] == "ok":
            stderr = "" if task["stderr"] is None else f" ± {100 * task['stderr']:.1f}"
            bits = task["bits_per_byte"]
            low, high = task["interval"]
            cells = (
                f"{task['n']} of {task['n_published']}",
                f"{100 * task['score']:.1f}{stderr}{'' if task['complete'] else ' *'}",
                f"{100 * low:.1f} - {100 * high:.1f}",
                f"{100 * task['chance']:.1f}" if task["chance"] else "",
                "" if bits is None else f"{bits:.3f}",
            )
        theirs = (f"{published[model][name]}" if name in published[model] else "" for model in models)
        shots = f"{task['shots']}{'' if task['verified'] else '?'}"
        table.append((name, shots, task["metric"], *cells, *theirs, task["status"]))
    if results["average"] is not None:
        mark = "" if results["average_complete"] else " *"
        same = results["suite"] == "paper14"  # what the published averages are over
        theirs = (str(published[model].get("average", "")) if same else "" for model in models)
        table.append(("average", "", "", "", f"{100 * results['average']:.1f}{mark}", "", "", "", *theirs, ""))
    return table


def header(published: Published) -> tuple[str, ...]:
    """The names of the columns."""
    return (*HEADER, *columns(published), "status")


def notes(results: dict[str, Any], published: Published) -> list[str]:
    """What stands below the table: what was found odd, what is not complete, how to read the columns."""
    names_by_reason: dict[str, list[str]] = {}
    for name, task in results["tasks"].items():
        if task["reason"]:
            label = "" if task["status"] == "ok" else f"{task['status']}, "
            names_by_reason.setdefault(f"{label}{task['reason']}", []).append(name)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    ran = [task for task in results["tasks"].values() if task["status"] == "ok"]
    if ran and not results["average_complete"]:
        whole = sum(task["complete"] for task in ran)
        lines.append(
            f"* not the complete set; the average is over the {len(ran)} of {len(results['tasks'])} that ran, "
            f"{whole} of them complete: not to be compared with published ones"
        )
    if ran and results["centred_average"] is not None:
        lines.append(
            f"choices: centred average {100 * results['centred_average']:.1f} (0: guessing, 100: all right), "
            f"{results['bits_per_byte_average']:.3f} bits per byte of the right answers (lower is better, moves first)"
        )
    micro = [f"{name} {100 * task['macro']:.1f}" for name, task in results["tasks"].items() if _has_macro(task)]
    if micro:
        lines.append(f"mean over their parts (macro): {', '.join(micro)}")
    lines.append("score and chance in percent, ± one standard error; ?: number of shots not verified against the paper")
    averages = ", ".join(f"{model} {scores['average']}" for model, scores in published.items() if "average" in scores)
    if averages:
        lines.append(
            f"published averages of all 14, base models: {averages}. Unverified: prompts, shots and metrics of the "
            "paper could not be read, and may differ"
        )
    return lines


def _has_macro(task: dict[str, Any]) -> bool:
    return task["status"] == "ok" and abs(task["macro"] - task["score"]) > 1e-9


def terminal(results: dict[str, Any], published: Published) -> str:
    """The table with aligned columns, then the notes."""
    table = [header(published), *rows(results, published)]
    widths = [max(len(row[column]) for row in table) for column in range(len(table[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", *notes(results, published)])


def title(results: dict[str, Any]) -> str:
    """What was evaluated."""
    limit = "" if results["limit"] is None else f", at most {results['limit']} items each"
    return f"Evaluation of {results['model']} ({results['format']}{limit})"


def markdown(results: dict[str, Any], published: Published) -> str:
    """The same as a Markdown document."""
    names = header(published)
    lines = [f"# {title(results)}", "", f"| {' | '.join(names)} |", "|" + "---|" * len(names)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(results, published)]
    for note in notes(results, published):
        lines += ["", note]
    return "\n".join(lines) + "\n"


def page(results: dict[str, Any], published: Published, more: str = "") -> str:
    """The same as an HTML page that needs nothing else; a bar for each score, a tick for what guessing scores.

    `more`: HTML that stands below.
    """
    names = header(published)
    cells = "".join(f"<th class='left'>{html.escape(name)}</th>" for name in names)
    lines = [f"<tr>{cells}<th class='left'>0 to 100</th></tr>"]
    for row in rows(results, published):
        task = results["tasks"].get(row[0])
        ran = task is None or task["status"] == "ok"
        cells = "".join(f"<td{'' if i else ' class=left'}>{html.escape(cell)}</td>" for i, cell in enumerate(row))
        bar = ""
        if task is not None and ran:
            width, chance = 100 * task["score"], 100 * task["chance"]
            bar = f"<div><i style='width:{width:.1f}%'></i><b style='left:{chance:.1f}%'></b></div>"
        lines.append(f"<tr{'' if ran else ' class=none'}>{cells}<td class='bar'>{bar}</td></tr>")
    below = "".join(f"<p>{html.escape(note)}</p>" for note in notes(results, published))
    head = html.escape(title(results))
    return (
        f"<!doctype html><html lang='en'><meta charset='utf-8'><title>{head}</title><style>{STYLE}</style>"
        f"<h1>{head}</h1><table>{''.join(lines)}</table>{below}{more}</html>\n"
    )
