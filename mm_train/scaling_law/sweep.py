"""Train the runs of a sweep, several side by side, and collect their losses into one CSV. Torch-free.

python -m mm_train.scaling_law sweep configs/sweep/ablation.yaml
python -m mm_train.scaling_law sweep configs/sweep/ablation.yaml --rank "$SLURM_ARRAY_TASK_ID" --world 64

OUT/configs/NAME.yaml says what a run is, OUT/NAME is its run folder, OUT/NAME.log what it printed. The same command
goes on where it stopped: finished runs are never redone, and begun ones resume from their checkpoints. SIGTERM and
SIGUSR1 let the runs under way write a checkpoint; the command then leaves with status 75.
"""

import argparse
import csv
import io
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from tqdm import tqdm

from mm_train import config
from mm_train.cli import UserError
from mm_train.files import write_atomic, writing
from mm_train.metrics import read_metrics
from mm_train.scaling_law.spec import Run, load, runs, share
from mm_train.stopping import SIGNALS, STOPPED

COLUMNS = (
    *("name", "active_params", "total_params", "tokens", "expansion", "granularity", "shared", "variant", "seed"),
    *("loss", "bits_per_byte", "train_loss", "dropped_fraction", "tokens_per_second"),
)
LOOK_SECONDS = 0.5  # between two looks at the runs under way


def add_command(commands: "argparse._SubParsersAction") -> None:
    """The subcommand `sweep`."""
    parser = commands.add_parser("sweep", help="train the networks of a sweep file and collect their losses")
    parser.description = "Train the runs of a sweep file; the same command again goes on where it stopped."
    parser.add_argument("spec", type=Path, help="sweep file, as in configs/sweep/")
    parser.add_argument("--jobs", type=int, default=1, help="runs at once on this machine (default %(default)s)")
    parser.add_argument("--rank", type=int, default=0, help="this task's number in a job array (default %(default)s)")
    parser.add_argument("--world", type=int, default=1, help="tasks of the array (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="list the runs and what they cost, and train nothing")
    parser.add_argument("--collect", action="store_true", help="write OUT/runs.csv from what is finished, no more")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand; 1 when a run failed."""
    if args.jobs < 1 or args.world < 1 or not 0 <= args.rank < args.world:
        raise UserError(f"--jobs {args.jobs}, --rank {args.rank}, --world {args.world}: 0 <= rank < world, and 1 job")
    sweep = load(args.spec)
    everything = runs(sweep)
    out = Path(sweep.out)
    if args.dry_run:
        for run in everything:
            print(line(run, "finished" if is_finished(out, run) else ""))
        total = sum(run.facts["tokens"] for run in everything)
        print(f"{len(everything)} runs, {total:,} tokens")
        return 0
    if not args.collect:
        with stopping():
            failed = train(out, list(share(everything, args.rank, args.world)), args.jobs)
    done = collect(out, everything)
    print(f"{done} of {len(everything)} runs are in {out / 'runs.csv'}")
    if not args.collect and failed:
        for name, reason in failed.items():
            print(f"error: {name} failed: {reason} (all it printed: {out / name}.log)", file=sys.stderr)
        return 1
    return 0


def line(run: Run, state: str) -> str:
    """A run in a list."""
    facts = run.facts
    active, total = facts["active_params"], facts["total_params"]
    return f"{run.name:44s} active {active:>13,}  total {total:>15,}  tokens {facts['tokens']:>15,}  {state}".rstrip()


def train(out: Path, mine: Sequence[Run], jobs: int) -> dict[str, str]:
    """Train what is not finished, `jobs` at once; returns the name of each that failed with its reason."""
    for run in mine:
        remember(out, run)
    waiting = deque(run for run in mine if not is_finished(out, run))
    under_way: dict[str, tuple[Run, subprocess.Popen]] = {}
    failed: dict[str, str] = {}
    total = sum(run.facts["tokens"] for run in mine)
    done = sum(tokens_done(out, run) for run in mine)
    # smoothing 0: the ETA goes by the mean speed so far, because runs differ
    with tqdm(total=total, initial=done, unit="tok", unit_scale=True, desc=out.name, smoothing=0) as bar:
        try:
            while waiting or under_way:
                while waiting and len(under_way) < jobs:
                    run = waiting.popleft()
                    under_way[run.name] = (run, start(out, run))
                    bar.set_postfix_str(", ".join(under_way))
                time.sleep(LOOK_SECONDS)
                for run, process in list(under_way.values()):
                    if process.poll() is None:
                        continue
                    del under_way[run.name]
                    if not is_finished(out, run):
                        failed[run.name] = reason(out, run, process.returncode)
                        bar.write(f"{run.name} failed: {failed[run.name]}")
                bar.update(sum(tokens_done(out, run) for run in mine) - bar.n)
        finally:
            for _, process in under_way.values():
                process.terminate()  # it writes a checkpoint and ends
            for _, process in under_way.values():
                process.wait()
    return failed


@contextmanager
def stopping() -> Iterator[None]:
    """Inside, a signal that asks to stop ends this command with STOPPED; those after it are ignored."""

    def leave(*_: int | FrameType | None) -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        raise SystemExit(STOPPED)

    before = {number: signal.signal(number, leave) for number in SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(out: Path, run: Run) -> subprocess.Popen:
    """The training command, its output into a file."""
    command = [sys.executable, "-m", "mm_train.train", str(config_file(out, run))]
    environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)  # runs side by side, and the same sums on any machine
    with writing(out), (out / f"{run.name}.log").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)


def config_file(out: Path, run: Run) -> Path:
    """Where the resolved configuration of a run is."""
    return out / "configs" / f"{run.name}.yaml"


def remember(out: Path, run: Run) -> None:
    """Write down what a run is. Raises UserError when it was begun as something else."""
    path = config_file(out, run)
    if path.is_file() and (out / run.name).is_dir() and config.load([path]) != run.config:
        raise UserError(
            f"{out / run.name} was begun with another configuration ({path}): remove both to train it anew, or give the"
            " sweep another `out`"
        )
    with writing(out):
        path.parent.mkdir(parents=True, exist_ok=True)
    config.save(run.config, path)


def is_finished(out: Path, run: Run) -> bool:
    return (out / run.name / "DONE").is_file()


def tokens_done(out: Path, run: Run) -> int:
    """Tokens that a run has trained on, as far as its log says."""
    if is_finished(out, run):
        return int(run.facts["tokens"])
    try:
        steps = read_metrics(out / run.name).get("train", [])
    except UserError:  # not begun
        return 0
    return int(steps[-1].get("tokens") or 0) if steps else 0


def reason(out: Path, run: Run, code: int) -> str:
    """Why a run ended, from what it printed last."""
    text = (out / f"{run.name}.log").read_text(encoding="utf-8", errors="replace")
    lines = [text for text in text.splitlines() if text.strip()]
    return f"exit status {code}: {lines[-1][:300] if lines else 'it printed nothing'}"


def collect(out: Path, everything: Sequence[Run]) -> int:
    """Write OUT/runs.csv, one row for each finished run in the sweep's order; returns how many. Raises UserError."""
    table = io.StringIO()
    writer = csv.DictWriter(table, COLUMNS, lineterminator="\n")
    writer.writeheader()
    rows = [run.facts | outcome(out / run.name) for run in everything if is_finished(out, run)]
    writer.writerows(rows)
    with writing(out):
        out.mkdir(parents=True, exist_ok=True)
        write_atomic(out / "runs.csv", table.getvalue().encode())
    return len(rows)


def outcome(folder: Path) -> dict[str, Any]:
    """What came of a finished run: held-out loss (nats a token) and bits per byte over all sources together.

    Raises UserError when nothing was held out.
    """
    records = read_metrics(folder)
    step = json.loads((folder / "DONE").read_text())["step"]
    scores = [record for record in records.get("validation", []) if record["step"] == step]
    if not scores:
        raise UserError(f"{folder} has no held-out loss after its last step: set data.validation in the sweep")
    tokens, num_bytes = (sum(score[key] for score in scores) for key in ("tokens", "bytes"))
    last = records["train"][-1]
    return {
        "loss": round(sum(score["loss"] * score["tokens"] for score in scores) / tokens, 6),
        "bits_per_byte": round(sum(score["bits_per_byte"] * score["bytes"] for score in scores) / num_bytes, 6),
        "train_loss": round(last["loss"], 6),
        "dropped_fraction": last.get("dropped_fraction"),
        "tokens_per_second": round(statistics.median(record["tokens_per_second"] for record in records["train"])),
    }
