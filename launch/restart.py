"""Is a SLURM job that has ended started again? Decisions and their record, without SLURM. Only the standard library.

    history = History(run_dir, job_id)
    why_not = refusal(history.starts, newest_step(run_dir), limits)      # before a start
    ...
    decision = decide(ending, history.starts, newest_step(run_dir), limits)   # after it

What counts is how training ended, and whether the job gets anywhere: a start that ends at the checkpoint from which it
began has done nothing, whatever ended it.
"""

import contextlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from mm_train.cli import LostContact, UserError
from mm_train.files import write_atomic
from mm_train.stopping import STOPPED
from mm_train.watchdog import HUNG

FAILED = "failed"  # Start.ended of a start that counts against the cap; None (nobody could say it) counts too
CANCELLED = "cancelled"
BAD_NODES = "bad nodes"  # that training never began: such a start says nothing of the run
NAMES = {
    STOPPED: "stopped with a checkpoint",
    HUNG: "hung",
    UserError.status: "bad input",
    LostContact.status: "lost contact",
}


@dataclass(frozen=True)
class Limits:
    """When a job that fails is given up."""

    restarts: int = 20  # starts that failed
    no_progress: int = 3  # starts in a row from one checkpoint


@dataclass
class Start:
    """One start of a job, a line in RUN/slurm/restarts.jsonl."""

    job: str
    restart: int  # SLURM's count: 0 for the first start
    step: int  # of the newest checkpoint, from which it goes on
    nodes: list[str]
    world: int  # processes
    began: str = ""  # ISO times
    ended: str | None = None  # why; None as long as it runs, and for ever when nobody was left to say it
    status: int | None = None
    finished: str | None = None
    step_after: int | None = None  # of the newest checkpoint at its end
    bad_nodes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Ending:
    """How a start ended."""

    status: int | None  # of the rank that failed first; else 75 when they stopped on request, else 0; None: not begun
    done: bool = False  # RUN/DONE is there
    warned: str | None = None  # what announced the end of the job's time, in words
    cancelled: bool = False  # SIGTERM: scancel, the time limit itself, or a preemption that SLURM follows up by itself


@dataclass(frozen=True)
class Decision:
    """What is done with the job now."""

    requeue: bool
    ended: str  # for Start.ended
    why: str  # a line for people
    status: int  # exit status of the batch script


def decide(ending: Ending, starts: Sequence[Start], step: int, limits: Limits) -> Decision:
    """What follows from the end of the last of `starts`; `step` is that of the newest checkpoint now."""
    status = ending.status
    if ending.done:
        return Decision(False, "done", "done", 0)
    if ending.cancelled:
        return Decision(False, CANCELLED, "ended by SLURM (scancel, or its time is over): not requeued", 128 + 15)
    if status == UserError.status and not ending.warned:
        return Decision(False, "bad input", "the same command would fail again: not requeued", status)
    if status == STOPPED and not ending.warned:
        why = "stopped on request (the file STOP, or a signal to the processes): not requeued"
        return Decision(False, "stopped", why, STOPPED)
    if ending.warned:
        ended, why = "time", f"{ending.warned}; training {describe(status)}"
    else:
        ended, why = FAILED, f"training {describe(status)}"
    closed = [*starts[:-1], Start(**asdict(starts[-1]) | {"ended": ended})]
    if why_not := refusal(closed, step, limits):
        return Decision(False, ended, f"{why}; given up: {why_not}", status or 1)
    return Decision(True, ended, f"{why}; once more, to go on after step {step}", status or 1)


def refusal(starts: Sequence[Start], step: int, limits: Limits) -> str | None:
    """Why a job with these starts behind it is not started once more from `step`; None when it may be."""
    failed = [start for start in starts if start.ended in (FAILED, None)]
    if len(failed) > limits.restarts:
        return f"{len(failed)} starts have failed (MM_MAX_RESTARTS={limits.restarts})"
    last = starts[-limits.no_progress :]
    if len(last) == limits.no_progress and all(start.ended == BAD_NODES for start in last):
        return f"the last {len(last)} starts found unfit nodes (MM_MAX_NO_PROGRESS={limits.no_progress})"
    tried = [start for start in starts if start.ended != BAD_NODES]
    last = tried[-limits.no_progress :]
    if len(last) == limits.no_progress and all(start.step == step for start in last):
        return (
            f"the last {len(last)} starts began at step {step} and left no newer checkpoint"
            f" (MM_MAX_NO_PROGRESS={limits.no_progress})"
        )
    return None


def describe(status: int | None) -> str:
    """An exit status in words."""
    if status is None:
        return "had not begun"
    if status == 0:
        return "ended without its mark DONE"
    if status in NAMES:
        return f"{NAMES[status]} (status {status})"
    return f"was killed by signal {status - 128}" if 128 < status < 160 else f"failed (status {status})"


def newest_step(run_dir: Path) -> int:
    """Step of the newest complete checkpoint, by the names of the folders; 0 without any."""
    steps = [re.fullmatch(r"step-(\d{8,})", path.name) for path in (run_dir / "checkpoints").glob("step-*")]
    return max((int(match[1]) for match in steps if match), default=0)


class History:
    """RUN/slurm/restarts.jsonl: one object a start, of all jobs that ever worked on the run."""

    def __init__(self, run_dir: Path, job: str) -> None:
        self.file, self.job = run_dir / "slurm" / "restarts.jsonl", job

    @property
    def starts(self) -> list[Start]:
        """Those of this job: whoever submits a new one has seen what was wrong."""
        return [start for start in read_starts(self.file) if start.job == self.job]

    def begin(self, restart: int, step: int, nodes: list[str], world: int) -> None:
        self._write([*read_starts(self.file), Start(self.job, restart, step, nodes, world, began=now())])

    def end(self, restart: int, ended: str, status: int | None, step: int, bad_nodes: Sequence[str] = ()) -> None:
        """Close a start; on a node that SLURM has lost, an earlier one may end after a later one."""
        starts = read_starts(self.file)
        for start in starts:
            if (start.job, start.restart) == (self.job, restart):
                start.ended, start.status, start.step_after, start.finished = ended, status, step, now()
                start.bad_nodes = list(bad_nodes)
        self._write(starts)

    def _write(self, starts: Sequence[Start]) -> None:
        write_atomic(self.file, "".join(json.dumps(asdict(start)) + "\n" for start in starts).encode())


def read_starts(file: Path) -> list[Start]:
    """The starts in a restarts.jsonl; lines that are none are passed over."""
    starts = []
    with contextlib.suppress(FileNotFoundError):
        for line in file.read_text(encoding="utf-8").splitlines():
            with contextlib.suppress(ValueError, TypeError):
                values: Any = json.loads(line)
                starts.append(Start(**values))
    return starts


def now() -> str:
    """Local time, with the distance from UTC."""
    return datetime.now().astimezone().isoformat(timespec="seconds")
