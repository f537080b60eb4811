"""Evaluation results as text: the aligned table on the terminal and results.md."""

from typing import Any

HEADER = ("benchmark", "shots", "metric", "items", "score", "chance", "gold bpb", "status")


def rows(results: dict[str, Any]) -> list[tuple[str, ...]]:
    """One row a benchmark; scores in percent with their standard error."""
    table: list[tuple[str, ...]] = []
    for name, task in results["tasks"].items():
        cells = ("", "", "", "")
        if task["status"] == "ok":
            stderr = "" if task["stderr"] is None else f" ± {100 * task['stderr']:.1f}"
            cells = (
                f"{task['n']} of {task['n_total']}",
                f"{100 * task['score']:.1f}{stderr}",
                f"{100 * task['chance']:.1f}",
                f"{task['bits_per_byte']:.3f}",
            )
        table.append((name, str(task["shots"]), task["metric"], *cells, task["status"]))
    return table


def notes(results: dict[str, Any], published: dict[str, float]) -> list[str]:
    """What stands below the table: why a benchmark did not run, the average, how to read the columns."""
    names_by_reason: dict[str, list[str]] = {}
    for name, task in results["tasks"].items():
        if task["reason"]:
            names_by_reason.setdefault(f"{task['status']}, {task['reason']}", []).append(name)
    lines = [f"{', '.join(names)}: {reason}" for reason, names in names_by_reason.items()]
    done = [task for task in results["tasks"].values() if task["status"] == "ok"]
    if done:
        lines.append(f"average of the {len(done)} that ran: {100 * results['average']:.1f}")
    lines.append(
        "score and chance in percent, ± one standard error; gold bpb: bits per byte of the right answers (lower is "
        "better, moves before the scores do)"
    )
    averages = ", ".join(f"{model} {value}" for model, value in published.items())
    lines.append(f"for orientation, published averages of all 14 (base models; settings may differ): {averages}")
    return lines


def terminal(results: dict[str, Any], published: dict[str, float]) -> str:
    """The table with aligned columns, then the notes."""
    table = [HEADER, *rows(results)]
    widths = [max(len(row[column]) for row in table) for column in range(len(HEADER))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table]
    return "\n".join([*lines, "", *notes(results, published)])


def markdown(results: dict[str, Any], published: dict[str, float]) -> str:
    """The same as a Markdown document."""
    limit = "" if results["limit"] is None else f", at most {results['limit']} items each"
    lines = [f"# Evaluation of {results['model']} ({results['format']}{limit})", ""]
    lines += [f"| {' | '.join(HEADER)} |", "|" + "---|" * len(HEADER)]
    lines += [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows(results)]
    for note in notes(results, published):
        lines += ["", note]
    return "\n".join(lines) + "\n"
