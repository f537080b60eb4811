"""Break a training run again and again, and see whether it ends as if nothing had happened.

python -m mm_train.faults configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml train.tokens=99999 checkpoint.every=5
python -m mm_train.faults MODEL.yaml STAGE.yaml parallel.expert_parallel=2 --ranks 2 --kills 60 --hangs 2 --stops 4

One run is left alone (OUT/reference). The other (OUT/broken), with the same config, gets SIGKILL at random instants, a
share of them while a checkpoint is being written, and is started again, by the same command every time, until it is
through. In the end all that its log says of training, validation and skipped steps (apart from times, speeds and
memory) and every bit of its last checkpoint must be the reference's, and every time it must have gone on from the
newest checkpoint that is complete. Exit status 1 when anything is not so.

Each blow has its place in the run, drawn beforehand, and falls when the run comes by it. So the number of starts is
known, and the run gets to its end however many blows there are.
"""

import argparse
import json
import random
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from mm_train import config
from mm_train.cli import UserError, command
from mm_train.fault_report import Outcome, blow_line, compare_checkpoints, compare_logs, log_records, report_lines
from mm_train.fault_run import SILENT_SECONDS, Attempt, Blow, Timing, newest_intact, strike
from mm_train.files import write_atomic
from mm_train.processes import LAUNCHER
from mm_train.rules import check_world
from mm_train.stopping import STOPPED
from mm_train.watchdog import HUNG

EPILOG = """kinds of blows:
  kill    SIGKILL at a random instant of training; a share of --during-writes while a checkpoint is written, and a
          tenth during start-up; to one rank, to all of them, or (ranks > 1) to launch/local.sh
  hang    SIGSTOP of one rank: the watchdog of the others has to end the run within faults.hang_seconds
  stop    SIGTERM or SIGUSR1 to launch/local.sh (one process: to itself): exit status 75, and no step is lost

examples:
  python -m mm_train.faults configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml train.tokens=163840 \\
      checkpoint.every=5
  python -m mm_train.faults MODEL.yaml STAGE.yaml parallel.expert_parallel=2 --ranks 2 --kills 60 --hangs 2 --stops 4
"""
END_SECONDS = 60.0  # for what was killed, and all that depends on it, to be gone
HANG_SECONDS = 45.0  # faults.hang_seconds, unless the command line has another; start-up must not take longer
MARGIN = 3  # last steps without a blow, which could come too late there


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.faults",
        description="Kill, hang and stop a training run at random instants, and compare it with an undisturbed one.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="FILE.yaml | key=value", help="as for mm_train.train")
    parser.add_argument("--kills", type=int, default=20, metavar="N", help="SIGKILLs in all; default %(default)s")
    parser.add_argument(
        "--hangs", type=int, default=0, metavar="N", help="SIGSTOPs; default %(default)s, more need --ranks 2"
    )
    parser.add_argument("--stops", type=int, default=0, metavar="N", help="requests to stop; default %(default)s")
    parser.add_argument(
        "--during-writes",
        type=float,
        default=0.3,
        metavar="SHARE",
        help="of the kills that fall while a checkpoint is written, from 0 to 1; default %(default)s",
    )
    parser.add_argument(
        "--ranks",
        type=int,
        default=1,
        metavar="N",
        help="processes of the run, started by launch/local.sh when there is more than one; default %(default)s",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="of places and targets (instants are the machine's); default %(default)s"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("runs/faults"), help="new folder for both runs; default %(default)s"
    )
    args = parser.parse_intermixed_args(argv)
    cfg, words = prepare(args)
    blows = plan(args, cfg)
    outcome = run(args, cfg, words, blows)
    write_atomic(args.out / "faults.json", (json.dumps(asdict(outcome), indent=1) + "\n").encode())
    print("\n".join(report_lines(outcome)))
    print(f"written to {args.out / 'faults.json'}")
    return 1 if outcome.problems else 0


def prepare(args: argparse.Namespace) -> tuple[config.Config, list[str]]:
    """The config, and the words for the training command without run.dir. Raises UserError for what cannot work."""
    least = {"--kills": (args.kills, 0), "--hangs": (args.hangs, 0), "--stops": (args.stops, 0)}
    least["--ranks"] = (args.ranks, 1)
    for name, (value, lowest) in least.items():
        if value < lowest:
            raise UserError(f"{name} is {value}; it must be at least {lowest}")
    if not 0 <= args.during_writes <= 1:
        raise UserError(f"--during-writes is {args.during_writes}; it is a share, from 0 to 1")
    if args.hangs and args.ranks == 1:
        raise UserError("--hangs needs --ranks 2 or more: a single process that hangs has nobody to notice it")
    if args.ranks > 1 and not LAUNCHER.exists():
        raise UserError(f"--ranks {args.ranks} needs {LAUNCHER}, which is not there")
    if not Path("/proc/self/stat").exists():
        raise UserError("this command finds the ranks in /proc, which only Linux has")
    args.out = args.out.resolve()
    if args.out.exists() and any(args.out.iterdir()):
        raise UserError(f"--out {args.out} is not empty: name a new folder, or remove it")
    files, overrides = config.split_words(args.configs)
    files = [str(Path(file).resolve()) for file in files]
    if args.hangs and not any(word.startswith("faults.hang_seconds=") for word in overrides):
        overrides.append(f"faults.hang_seconds={HANG_SECONDS}")
    # Every step in the log, or an interval that a kill has cut could not be compared.
    words = [*files, *overrides, "log.every=1", "log.wandb=disabled"]
    cfg = config.load_words([*words, f"run.dir={args.out / 'reference'}"])
    check_world(cfg.parallel, args.ranks)
    cfg.micro_steps(args.ranks)
    return cfg, words


def plan(args: argparse.Namespace, cfg: config.Config) -> list[Blow]:
    """The blows in the order of their places. Raises UserError when the run is too short for them."""
    last = cfg.total_steps - MARGIN
    checkpoints = last // cfg.checkpoint.every
    writes = round(args.kills * args.during_writes)
    if last < 1 or (writes and not checkpoints):
        raise UserError(
            f"the run has {cfg.total_steps} steps and a checkpoint every {cfg.checkpoint.every} (checkpoint.every):"
            f" too few to break it; it needs more than {MARGIN} steps and a checkpoint before the last {MARGIN}"
        )
    rng = random.Random(args.seed)
    starts = round((args.kills - writes) * 0.1)
    kinds = ["write"] * writes + ["start"] * starts + ["kill"] * (args.kills - writes - starts)
    kinds += ["hang"] * args.hangs + ["stop"] * args.stops
    blows = []
    for kind in kinds:
        place = cfg.checkpoint.every * rng.randint(1, checkpoints) if kind == "write" else rng.uniform(0, last)
        target = rng.choices(["one", "all", "launcher"], [65, 25, 10])[0] if args.ranks > 1 else "one"
        number = rng.choice([signal.SIGTERM, signal.SIGUSR1]) if kind == "stop" else signal.SIGKILL
        number = signal.SIGSTOP if kind == "hang" else number
        target = {"hang": "one", "stop": "launcher" if args.ranks > 1 else "one"}.get(kind, target)
        blows.append(Blow(kind, place, rng.random(), target, rng.randrange(args.ranks), number))
    return sorted(blows, key=lambda blow: blow.place)


def run(args: argparse.Namespace, cfg: config.Config, words: list[str], blows: list[Blow]) -> Outcome:
    """Both runs, and the comparison."""
    args.out.mkdir(parents=True, exist_ok=True)
    reference, broken = args.out / "reference", args.out / "broken"
    begun = time.monotonic()
    with tqdm(total=cfg.total_steps, desc="undisturbed", unit="step", disable=None, leave=False) as bar:
        attempt = start(words, args.ranks, reference)
        finish(attempt, bar)
    if attempt.status != 0:
        raise UserError(f"the undisturbed run failed (status {attempt.status}): {attempt.output(3)}")
    undisturbed = time.monotonic() - begun
    newest_intact(reference)  # imports torch, for which there is no time between a blow's place and its moment
    timing = Timing.measure(reference, attempt.first_step_seconds or 0.0)
    outcome = Outcome(words, args.ranks, args.seed, cfg.total_steps, timing, undisturbed)
    begun = time.monotonic()
    with tqdm(total=len(blows) + 1, desc="breaking", unit="start", disable=None, leave=False) as bar:
        break_run(broken, cfg.faults.hang_seconds, blows, outcome, bar)
    outcome.broken_seconds = time.monotonic() - begun
    if not outcome.problems:
        outcome.steps_done = sum(record["kind"] == "train" for record in log_records(broken))
        outcome.problems += [*compare_logs(reference, broken), *compare_checkpoints(reference, broken)]
    return outcome


def start(words: list[str], ranks: int, run_dir: Path) -> Attempt:
    return Attempt([*words, f"run.dir={run_dir}"], ranks, run_dir, run_dir.with_suffix(".log"))


def finish(attempt: Attempt, bar: tqdm | None = None) -> None:
    """Let it come to its end; kill it if it stands still."""
    try:
        while attempt.look() and time.monotonic() - attempt.moved < SILENT_SECONDS:
            if bar is not None and attempt.step is not None:
                bar.update(attempt.step - bar.n)
            time.sleep(0.02)
    finally:
        attempt.kill()


def break_run(run_dir: Path, hang_seconds: float, blows: list[Blow], outcome: Outcome, bar: tqdm) -> None:
    """Start, strike, check, and again, until the run is through or something is wrong."""
    newest = 0  # step of the checkpoint to go on from
    for blow in [*blows, None]:
        attempt = start(outcome.words, outcome.ranks, run_dir)
        outcome.starts += 1
        struck = False
        try:
            if blow is None:
                finish(attempt)
            elif struck := strike(attempt, blow, outcome.timing):
                outcome.blows.append(blow)
                outcome.problems += aftermath(attempt, blow, hang_seconds)
        finally:
            attempt.kill()
        if attempt.first_step not in (None, newest):
            outcome.problems.append(
                f"start {outcome.starts} went on after step {attempt.first_step}; the newest complete checkpoint was of"
                f" step {newest}"
            )
        if attempt.first_step_seconds is not None:
            outcome.start_seconds.append(attempt.first_step_seconds)
        if not struck and (blow is not None or attempt.status != 0):
            what = "stood still" if attempt.status is None else f"ended by itself with status {attempt.status}"
            outcome.problems.append(f"start {outcome.starts} {what}; its last lines:\n{attempt.output()}")
        if blow is not None and struck:
            newest = blow.newest
            bar.write(blow_line(len(outcome.blows), blow), file=sys.stdout)
        bar.update()
        if outcome.problems:
            return


def aftermath(attempt: Attempt, blow: Blow, hang_seconds: float) -> list[str]:
    """Wait until everything is gone, note what is left, and say what is not as it must be."""
    begun, wall = time.monotonic(), time.time()
    problems = []
    allowed = END_SECONDS + {"hang": hang_seconds, "stop": SILENT_SECONDS}.get(blow.kind, 0.0)
    if not attempt.wait(allowed):
        problems.append(f"{allowed:.0f} s after the blow something still runs; its last lines:\n{attempt.output()}")
    blow.seconds = time.monotonic() - begun
    blow.status, blow.went_on_from, blow.struck_after = attempt.status, attempt.first_step, attempt.step
    blow.left_partial = bool(attempt.writing())
    blow.newest, damaged = newest_intact(attempt.run_dir)
    problems += damaged
    expected = {"stop": STOPPED, "hang": HUNG}.get(blow.kind, 128 + signal.SIGKILL)
    if attempt.status != expected:
        problems.append(f"exit status {attempt.status} instead of {expected}; its last lines:\n{attempt.output()}")
    if blow.kind == "stop" and blow.newest != attempt.step:
        problems.append(f"stopped on request after step {attempt.step}, but the newest checkpoint is of {blow.newest}")
    if blow.kind == "hang" and not any(f.stat().st_mtime >= wall for f in attempt.run_dir.glob("stacks/rank-*.txt")):
        problems.append("a rank hung, and no stacks were left")
    return problems


if __name__ == "__main__":
    sys.exit(main())
