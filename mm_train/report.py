"""What came out of training, as a table on the console and as one self-contained HTML page.

Reads only files that other programs wrote: metrics.jsonl of every stage, eval/results.json, the release in export/,
validation-{bf16,int4}.json of mm_train.validate, and samples.json of mm_train.generate. What is missing is left out.
"""

import argparse
import json
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_train.cli import UserError, command
from mm_train.files import write_atomic
from mm_train.log_lines import Record, short
from mm_train.run_folder import Stage, read_stages

EXAMPLES = """examples:
  python -m mm_train.report runs/quickstart --data data/quickstart
  python -m mm_train.report runs/quickstart/pretrain --out pretrain.html
"""

EVENTS = {  # kind -> what one is called
    "resumed": "resume",
    "skipped": "skipped step",
    "rollback": "rollback",
    "alert": "alert",
    "stopped": "requested stop",
}
BASELINES = {"unigram entropy": "unigram_bits_per_byte", "zstd -19": "zstd19_bits_per_byte"}


@dataclass
class Report:
    """All that is known about one stage, or a chain of stages; a part that is missing is None or empty."""

    title: str
    stages: list[Stage]
    baselines: dict[str, dict[str, float]]  # source -> baseline -> bits per byte
    evaluation: dict[str, Any] | None  # results.json
    release: dict[str, Any] | None  # {"bytes", "format", "bf16_bytes"}
    held_out: dict[str, dict[str, Record]]  # format ("bf16", "int4") -> source -> scores of the release
    samples: list[dict[str, str]]  # samples.json

    @property
    def sources(self) -> list[str]:
        """Every held-out source of any stage, in order of appearance."""
        return list(dict.fromkeys(source for stage in self.stages for source in stage.validation))

    @property
    def int4_losses(self) -> dict[str, tuple[float, float]]:
        """Source -> held-out loss in bf16 and in int4, where both were measured."""
        bf16, int4 = self.held_out["bf16"], self.held_out["int4"]
        return {source: (bf16[source]["loss"], int4[source]["loss"]) for source in bf16 if source in int4}


def read_report(folder: Path, data: Path | None = None) -> Report:
    """Read a run folder, or a folder of run folders with what was made from them.

    Args:
        folder: a run folder (metrics.jsonl in it) or the parent of several.
        data: the data set folder, for its baselines.json.

    Raises:
        UserError: no run in the folder, no baselines in the data set, or a file that cannot be read.
    """
    stages = read_stages(folder)
    baselines = read_json(data / "baselines.json") if data else {}
    if baselines is None:
        raise UserError(f"no baselines.json in {data}: --data takes a data set folder written by data_prep.run")
    return Report(
        title=folder.resolve().name,
        stages=stages,
        baselines={
            source: {label: facts[key] for label, key in BASELINES.items() if facts.get(key) is not None}
            for source, facts in baselines.items()
        },
        evaluation=read_json(folder / "eval" / "results.json"),
        release=read_release(folder / "export", stages[-1].facts.get("params_total")),
        held_out={name: read_json(folder / f"validation-{name}.json") or {} for name in ("bf16", "int4")},
        samples=read_json(folder / "samples.json") or [],
    )


def read_release(folder: Path, params_total: int | None) -> dict[str, Any] | None:
    """Size and format of an exported model; None when there is none."""
    weights = folder / "model.safetensors"
    if not weights.exists():
        return None
    quantization = (read_json(folder / "config.json") or {}).get("quantization") or {}
    return {
        "bytes": weights.stat().st_size,
        "format": quantization.get("format", "bf16"),
        "bf16_bytes": 2 * params_total if params_total else None,
    }


def read_json(path: Path) -> Any:
    """The content of a JSON file; None when there is no such file."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


def stage_table(report: Report) -> list[list[str]]:
    """A heading, a row for each stage and a row for each baseline."""
    rows = [["stage", "steps", "tokens", "first loss", "last loss", *report.sources, "tokens/s"]]
    for stage in report.stages:
        losses = stage.series("loss")[1]
        first, last = (losses[0], losses[-1]) if losses else (None, None)
        bits = [stage.last_held_out(source, "bits_per_byte") for source in report.sources]
        name = stage.name if stage.finished else f"{stage.name} (unfinished)"
        cells = [decimal(first), decimal(last), *map(decimal, bits), short(stage.tokens_per_second) or ""]
        rows.append([name, str(stage.steps), short(stage.tokens) or "", *cells])
    for label in BASELINES:
        bits = [report.baselines.get(source, {}).get(label) for source in report.sources]
        if any(bits):
            rows.append([label, "", "", "", "", *map(decimal, bits), ""])
    return rows


def score_table(report: Report) -> list[list[str]]:
    """A heading and a row for each benchmark; one without a score says why."""
    rows = [["benchmark", "score", "std. error", "chance", "items", "metric"]]
    for name, task in (report.evaluation or {"tasks": {}})["tasks"].items():
        if task.get("score") is None:
            rows.append([name, "", "", "", "", f"{task['status']}: {task['reason']}"])
        else:
            numbers = [decimal(task[key]) for key in ("score", "stderr", "chance")]
            rows.append([name, *numbers, f"{task['n']}/{task['n_total']}", task["metric"]])
    return rows


def score_line(report: Report) -> str:
    """What was evaluated, and the average."""
    if report.evaluation is None:
        return "not run yet"
    limit, average = report.evaluation["limit"], report.evaluation["average"]
    extent = f"at most {limit} items each" if limit else "all items"
    part = "" if report.evaluation.get("average_complete", True) else " over what ran"
    return f"{report.evaluation['format']} weights, {extent}, average {decimal(average) or 'none'}{part}"


def release_line(report: Report) -> str:
    """Size of the release."""
    release = report.release
    if release is None:
        return "not exported yet"
    line = f"{release['format']}, {release['bytes']:,} bytes"
    return line + (f" (the same weights in bf16: {release['bf16_bytes']:,})" if release["bf16_bytes"] else "")


def int4_lines(report: Report) -> list[str]:
    """What quantisation costs: for each source the loss of the int4 release beside that of the same model in bf16."""
    return [
        f"held-out {source}: loss {bf16:.4f} in bf16, {int4:.4f} in int4 ({int4 / bf16 - 1:+.2%})"
        for source, (bf16, int4) in report.int4_losses.items()
    ]


def course_lines(report: Report) -> list[str]:
    """For each stage what went on beside training: how long checkpoints stopped it, and events by kind."""
    lines = []
    for stage in report.stages:
        stalls = [r["stalled_seconds"] for r in stage.checkpoints if r.get("stalled_seconds") is not None]
        parts = []
        if stalls:
            parts.append(f"training stood still {sum(stalls):.1f} s for {plural(len(stalls), 'checkpoint')}")
        kinds = Counter(event.kind for event in stage.events)
        parts += [plural(number, EVENTS[kind]) for kind, number in kinds.items()]
        if parts:
            lines.append(f"{stage.name}: {', '.join(parts)}")
    return lines


def plural(number: int, noun: str) -> str:
    """A number of things."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def summary(report: Report, page: Path) -> str:
    """The report for the console."""
    stages = [align(stage_table(report))]
    if report.sources:
        stages.append(f"{', '.join(report.sources)}: held-out bits per byte, lower is better")
    benchmarks = [f"Benchmarks: {score_line(report)}"]
    if report.evaluation:
        benchmarks.append(align(score_table(report)))
    parts = [
        "\n".join(stages),
        "\n".join(course_lines(report)),
        "\n".join(benchmarks),
        "\n".join([f"Release: {release_line(report)}", *int4_lines(report)]),
        *(
            f"Sample ({s['kind']}): {' '.join((s['prompt'] + ' >>> ' + s['text']).split())[:300]}"
            for s in report.samples
        ),
        f"Report: {page}",
    ]
    return "\n\n".join(filter(None, parts))


def decimal(value: float | None) -> str:
    """Three decimals; nothing for None."""
    return "" if value is None else f"{value:.3f}"


def align(rows: list[list[str]]) -> str:
    """Cells as aligned text: names to the left, numbers to the right, a rule below the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = [not any(cell[:1].isdigit() for cell in column) for column in zip(*rows[1:], strict=True)]
    lines = [
        "  ".join(
            cell.ljust(width) if is_left else cell.rjust(width)
            for cell, width, is_left in zip(row, widths, left, strict=True)
        ).rstrip()
        for row in rows
    ]
    return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def render(report: Report) -> str:
    """The page as HTML; it fetches nothing from elsewhere.

    Raises:
        UserError: matplotlib or jinja2 is not installed.
    """
    try:
        import jinja2

        from mm_train import report_charts, report_panels
    except ImportError as error:
        raise UserError(f'the report needs {error.name}: pip install "mobilemoe-train[report]"') from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters |= {"decimal": decimal, "short": short}
    template = environment.from_string(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        charts=report_charts,
        drawn_sections=report_panels.drawn_sections(report.stages),
        load_history=report_panels.load_history,
        course_lines=course_lines(report),
        event_names=EVENTS,
        stage_table=stage_table(report),
        baseline_labels=list(BASELINES),
        score_line=score_line(report),
        release_line=release_line(report),
        int4_lines=int4_lines(report),
    )


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.report",
        description="Summarise training on the console and in one self-contained HTML page.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a run folder, or the folder that holds the run folders of a chain")
    parser.add_argument("--data", type=Path, help="data set folder: adds unigram entropy and zstd -19 for comparison")
    parser.add_argument("--out", type=Path, help="where to write the page (default: report.html in FOLDER)")
    args = parser.parse_args(argv)
    report = read_report(args.folder, args.data)
    page = args.out or args.folder / "report.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, render(report).encode())
    except OSError as error:
        raise UserError(f"cannot write the report {page}: {error.strerror or error}") from None
    print(summary(report, page))
    return 0


if __name__ == "__main__":
    sys.exit(main())
