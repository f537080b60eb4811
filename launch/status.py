"""How far a queued chain is: jobs as SLURM has them, progress, metrics and time left from the run folders.

python -m launch.status configs/recipe/s.yaml
python -m launch.status runs/s
python -m launch.status runs/ablation

The argument is a recipe, or the folder that launch.submit wrote chain.json into (of a chain, a sweep or a data set).
Nothing is disturbed, and where SLURM does not answer the files are still read.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import chain_checks, chain_jobs, slurm_queue
from launch.slurm_queue import JobState
from mm_train import recipe_plan, recipe_state
from mm_train.cli import UserError, command
from mm_train.log_lines import clock, number, short
from mm_train.recipe_plan import Recipe
from mm_train.recipe_state import DONE, RUNNING, State
from mm_train.report import align
from mm_train.run_folder import read_stage

RECENT = 20  # log lines whose median speed says how long the rest takes
UNKNOWN = "?"


@dataclass(frozen=True)
class Pace:
    """Latest metrics of a stage."""

    loss: float | None = None
    tokens_per_second: float | None = None
    mfu: float | None = None
    left: float | None = None  # seconds


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.status", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("chain", type=Path, metavar="RECIPE.yaml | FOLDER")
    parser.add_argument("--out", help="folder of the run folders (default: the recipe's)")
    args = parser.parse_args(argv)
    out, recipe_file = _place(args.chain, args.out)
    record = chain_checks.recorded(out)
    if recipe_file is None and not record:
        raise UserError(f"{out} has no {chain_checks.RECORD}: nothing was queued for it by launch.submit")
    in_slurm, silence = _ask(record)
    print(f"{out}: {_submitted(record)}")
    if recipe_file is None and not record.get("recipe"):
        print(arrays(record, in_slurm))
    else:
        recipe = recipe_plan.load(recipe_file or Path(record["recipe"]), str(out), record.get("overrides", ()))
        print(chain(recipe, record, in_slurm))
    if silence:
        print(f"note: {silence}: states of jobs are not known")
    return 0


def _place(path: Path, out: str | None) -> tuple[Path, Path | None]:
    """(folder of the run folders, recipe file or None)."""
    if path.is_dir():
        return path, None
    if not path.is_file():
        raise UserError(f"{path} is neither a recipe nor a folder of run folders")
    return recipe_plan.load(path, out).out, path


def _ask(record: Mapping[str, Any]) -> tuple[dict[str, list[JobState]], str | None]:
    """The states of each job of the record by its name, and why there are none."""
    if not record:
        return {}, None
    if not slurm_queue.is_here():
        return {}, "SLURM is not installed here"
    try:
        return {job["name"]: slurm_queue.job_states(str(job["job"])) for job in record.get("jobs", [])}, None
    except UserError as error:
        return {}, str(error)


def _submitted(record: Mapping[str, Any]) -> str:
    return f"queued {record['submitted']}" if record else "nothing was queued by launch.submit yet"


def chain(recipe: Recipe, record: Mapping[str, Any], in_slurm: Mapping[str, list[JobState]]) -> str:
    """A line for each step, time left, and why the first one that failed did."""
    ids = {job["name"]: job for job in record.get("jobs", [])}
    rows = [["step", "job", "SLURM", "restarts", "steps", "loss", "tokens/s", "MFU", "left", "run"]]
    found = recipe_state.states(recipe)
    total: list[float | None] = []
    troubles = []

    def job_cells(name: str) -> list[str]:
        job, states = ids.get(name), in_slurm.get(name, [])
        restarts = str(max((state.restarts for state in states), default=0)) if states else "-"
        return [str(job["job"]) if job else "-", slurm_said(states) if job else "-", restarts]

    rows += [
        [job["name"], *job_cells(job["name"]), *[""] * 6] for job in ids.values() if job["kind"] == chain_jobs.DATA
    ]
    estimates = record.get("estimates", {})
    for state in found:
        name = state.stage.name
        pace = pace_of(state)
        left = 0.0 if state.kind == DONE else pace.left
        if left is None and (hours := estimates.get(name, {}).get("hours")) is not None:
            left = hours * 3600 * (1 - state.step / state.total_steps if state.total_steps else 1)
            shown = f"~{clock(left)}"
        else:
            shown = UNKNOWN if left is None else clock(left) if left else ""
        total.append(left)
        metrics = [number(pace.loss, ".3f") or "", short(pace.tokens_per_second) or "", number(pace.mfu, ".1%") or ""]
        rows.append([name, *job_cells(name), state.progress, *metrics, shown, _kind(state, in_slurm.get(name, []))])
        troubles += why_not(name, state, in_slurm.get(name, []))
    if recipe.export:
        done = recipe_state.is_exported(recipe.export)
        rows.append(["export", *job_cells("export"), *[""] * 5, DONE if done else "not started"])
        if not done:
            last = recipe.stages[-1].run_dir
            troubles += _failure("export", in_slurm.get("export", []), last / "slurm")
    lines = [align(rows)]
    if all(left is not None for left in total) and any(total):
        lines.append(f"left: {clock(sum(left or 0.0 for left in total))}; ~: by the estimate at submission")
    return "\n".join([*lines, *troubles])


def pace_of(state: State) -> Pace:
    """The latest loss, speed and MFU of a stage, and how long the rest takes at the median of its recent speed."""
    folder = state.stage.run_dir
    if not (folder / "metrics.jsonl").is_file():
        return Pace()
    records = read_stage(folder).train
    if not records:
        return Pace()
    speeds = sorted(speed for record in records[-RECENT:] if (speed := record.get("tokens_per_second")))
    speed = speeds[len(speeds) // 2] if speeds else None
    batch, last = state.stage.config.train.global_batch_tokens, records[-1]
    left = (state.total_steps - state.step) * batch / speed if speed and state.total_steps else None
    return Pace(last.get("loss"), last.get("tokens_per_second"), last.get("mfu"), left)


def slurm_said(states: Sequence[JobState]) -> str:
    """The state of a job, or of the tasks of an array together, with the reason of one that waits."""
    if not states:
        return UNKNOWN
    counts: Counter[str] = Counter()
    for state in states:
        counts[state.state] += state.count
    if counts.total() == 1:
        (state,) = states
        waits = f" ({state.reason})" if state.state == "PENDING" and state.reason not in ("None", "") else ""
        return state.state + waits
    return ", ".join(f"{count} {name}" for name, count in counts.most_common())


def _kind(state: State, states: Sequence[JobState]) -> str:
    """What the run folder says; without a heartbeat a job that SLURM runs is starting."""
    if state.kind not in (DONE, RUNNING) and any(found.state == "RUNNING" for found in states):
        return "starting"
    return state.kind


def why_not(name: str, state: State, states: Sequence[JobState]) -> list[str]:
    """Why a stage failed or cannot be gone on with, as lines."""
    lines = [f"note: {state.trouble}"] if state.trouble else []
    return lines if state.kind == DONE else lines + _failure(name, states, state.stage.run_dir / "slurm")


def _failure(name: str, states: Sequence[JobState], folder: Path) -> list[str]:
    """The last line of summary.log, or of the job's own log, when its job failed."""
    failed = [state for state in states if state.is_over and state.state not in ("COMPLETED", "CANCELLED")]
    if not failed:
        return []
    state = failed[-1]
    log = next((path for path in (folder / "summary.log", folder / f"{state.job}.log") if path.is_file()), None)
    last = _last_line(log) if log else ""
    said = f": {last} ({log})" if last else f"; look into {folder}"
    return [f"{name} failed: job {state.job}, {state.state}, exit {state.exit_code}{said}"]


def _last_line(path: Path) -> str:
    """The last error that a log tells of, or else its last line."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 4096))
        lines = [line.strip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "error: " in line]
    return (errors or lines or [""])[-1][:300]


def arrays(record: Mapping[str, Any], in_slurm: Mapping[str, list[JobState]]) -> str:
    """The jobs of a sweep or a data set, with the tasks that failed and their logs."""
    rows = [["step", "job", "tasks", "SLURM", "restarts"]]
    lines = []
    for job in record.get("jobs", []):
        states = in_slurm.get(job["name"], [])
        restarts = str(sum(state.restarts for state in states)) if states else "-"
        rows.append([job["name"], str(job["job"]), str(job["tasks"] or 1), slurm_said(states), restarts])
        for state in states:
            if state.is_over and state.state not in ("COMPLETED", "CANCELLED"):
                file = f"{job['job']}_{state.task}.log" if state.task else f"{job['job']}.log"
                log = Path(job["folder"]) / "slurm" / file
                last = f": {_last_line(log)}" if log.is_file() else ""
                lines.append(f"{job['name']} task {state.task or 0} {state.state}{last} ({log})")
    return "\n".join([align(rows), *lines])


if __name__ == "__main__":
    sys.exit(main())
