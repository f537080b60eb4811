"""One start of the training command, watched from outside and struck at a chosen moment. Linux only.

Nothing in the training process takes part: what is known of it comes from metrics.jsonl, the names in checkpoints/ and
/proc, and what is done to it are signals.
"""

import contextlib
import itertools
import json
import math
import os
import signal
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_train.checkpoint.folders import candidates, complete, root_of, step_of
from mm_train.cli import UserError
from mm_train.metrics import read_metrics
from mm_train.processes import ROOT, training_command

SILENT_SECONDS = 300.0  # without a step: the run does not get on


@dataclass
class Blow:
    """What is done to one start of the run, and what came of it."""

    kind: str  # kill | write | start | hang | stop; "write" (while a checkpoint is written) and "start" are kills too
    place: float  # in steps: 12.3 is after step 12, three tenths into the next
    fraction: float  # write: how much of the time that a write takes; start: how much of the start-up
    target: str  # one | all | launcher
    rank: int  # for "one"
    signal: int
    went_on_from: int | None = None  # the step after which the struck start went on; None before it said so
    struck_after: int | None = None  # the last step that it logged
    left_partial: bool = False  # whether it left a checkpoint half written
    newest: int = 0  # step of the newest complete checkpoint that it left
    seconds: float = 0.0  # from the blow until everything was gone
    status: int | None = None

    @property
    def is_kill(self) -> bool:
        return self.kind in ("kill", "write", "start")


@dataclass(frozen=True)
class Timing:
    """What the undisturbed run took, in seconds."""

    step: float
    write: float  # of a checkpoint, from the copy to its final name
    start: float  # from the start to the end of the first step

    @staticmethod
    def measure(run_dir: Path, start: float) -> "Timing":
        records = read_metrics(run_dir)
        ends = [record["seconds"] for record in records["train"]]
        steps = [after - before for before, after in itertools.pairwise(ends)]
        writes = [record["seconds"] for record in records.get("checkpoint", [])]
        return Timing(statistics.median(steps or [0.0]), statistics.median(writes or [0.0]), start)


class Attempt:
    """The training command, started now on a run folder. `look` brings what is known of it up to date."""

    def __init__(self, words: Sequence[str], ranks: int, run_dir: Path, log: Path) -> None:
        """`words`: configs and overrides; what it prints is added to the file `log`."""
        self.run_dir, self.world = run_dir, ranks
        self.first_step: int | None = None  # the step after which it went on, once it has said so
        self.step: int | None = None  # the last one that it has logged
        self.first_step_seconds: float | None = None  # from the start to the end of the first step
        self.status: int | None = None  # exit status, 128 + N for signal N
        self._metrics = run_dir / "metrics.jsonl"
        self._offset = end_of_lines(self._metrics)
        self._partials = partials(run_dir)
        self._seen: set[int] = set()  # process ids of ranks
        with log.open("ab") as stream:
            # One thread: sums depend on their number, and the runs are compared bit for bit.
            environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ)
            self._log, self._log_start = log, stream.tell()
            self.started = self.moved = time.monotonic()
            self.process = subprocess.Popen(
                training_command(words, ranks), cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT
            )

    def look(self) -> bool:
        """Read what it has logged since the last call; returns whether it still runs."""
        code = self.process.poll()
        for record in self._new_records():
            self.moved = time.monotonic()
            if record["kind"] == "run":
                self.first_step = self.step = record["first_step"]
            elif record["kind"] == "train":
                self.step = record["step"]
                self.first_step_seconds = self.first_step_seconds or self.moved - self.started
        if code is not None:
            self.status = code if code >= 0 else 128 - code
        return code is None

    def writing(self) -> list[int]:
        """Steps of the checkpoints whose writing began since the start."""
        return sorted(step for step, begun in partials(self.run_dir).items() if self._partials.get(step) != begun)

    def ranks(self) -> dict[int, int]:
        """Rank -> process id of those that live."""
        if self.world == 1:
            found = {0: self.process.pid}
        else:
            found = {rank: pid for pid in children(self.process.pid) if (rank := rank_of(pid)) is not None}
        self._seen |= set(found.values())
        return found

    def all_ranks(self) -> dict[int, int]:
        """`ranks`, as soon as all have started; {} when it ended before."""
        while self.look():
            if len(found := self.ranks()) == self.world:
                return found
            time.sleep(0.005)
        return {}

    def wait(self, seconds: float) -> bool:
        """Until it and all of its ranks are gone, for at most `seconds`; returns whether they are."""
        deadline = time.monotonic() + seconds
        while self.look() or any(alive(pid) for pid in self._seen):
            if time.monotonic() > deadline:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        """Leave nothing running, whatever state it is in."""
        for pid in {*self._seen, *children(self.process.pid)} if self.process.poll() is None else self._seen:
            if alive(pid):
                send(pid, signal.SIGKILL)
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()

    def output(self, lines: int = 12) -> str:
        """The end of what it printed."""
        with self._log.open("rb") as stream:
            stream.seek(self._log_start)
            return "\n".join(stream.read().decode(errors="replace").splitlines()[-lines:])

    def _new_records(self) -> Iterable[dict[str, Any]]:
        try:
            if self._metrics.stat().st_size <= self._offset:
                return []
            with self._metrics.open("rb") as stream:
                stream.seek(self._offset)
                data = stream.read()
        except FileNotFoundError:
            return []
        data = data[: data.rfind(b"\n") + 1]
        self._offset += len(data)
        return [json.loads(line) for line in data.splitlines()]


def strike(attempt: Attempt, blow: Blow, timing: Timing) -> bool:
    """Wait for the moment, and strike; False when the run ended, or stood still, before."""
    if not attempt.all_ranks():
        return False
    while not _is_time(attempt, blow, timing):
        if not attempt.look() or time.monotonic() - attempt.moved > SILENT_SECONDS:
            return False
        time.sleep(0.001)
    ranks = attempt.ranks()
    if not ranks or not attempt.look():
        return False
    targets = {"launcher": [attempt.process.pid], "all": list(ranks.values())}
    for pid in targets.get(blow.target) or [ranks.get(blow.rank, min(ranks.values()))]:
        send(pid, blow.signal)
    return True


def _is_time(attempt: Attempt, blow: Blow, timing: Timing) -> bool:
    """Has the run come to the blow's place? If so, after what is left to wait."""
    if blow.kind == "start":
        return time.monotonic() - attempt.started >= blow.fraction * timing.start
    if attempt.step is None:
        return False
    if blow.kind == "write":
        if any(step >= blow.place for step in attempt.writing()):
            time.sleep(blow.fraction * timing.write)
            return True
        return attempt.step > blow.place and newest_intact(attempt.run_dir)[0] >= blow.place  # it was over too soon
    if attempt.step >= math.floor(blow.place):
        time.sleep(blow.place % 1 * timing.step)
        return True
    return False


def newest_intact(run_dir: Path) -> tuple[int, list[str]]:
    """(step of the newest checkpoint that is complete to the last byte, 0 for none; what is wrong with others).

    Only what bears a final name is looked at, and must be in order: half a checkpoint never gets one.
    """
    from mm_train.checkpoint.reader import Reader  # torch: not while the undisturbed run is timed

    wrong = []
    good = set()
    for folder in complete(run_dir):
        try:
            good.add(Reader(folder).verify().step)
        except UserError as error:
            wrong.append(str(error))
    steps = [step_of(folder) for folder in candidates(run_dir)[0]]
    return next((step for step in steps if step is not None and step in good), 0), wrong


def partials(run_dir: Path) -> dict[int, int]:
    """Step -> time of the last change (ns) of every checkpoint that is being written or was given up."""
    found = {}
    for folder in root_of(run_dir).glob("step-*.partial"):
        with contextlib.suppress(FileNotFoundError):  # gone again
            found[int(folder.stem.removeprefix("step-"))] = folder.stat().st_mtime_ns
    return found


def end_of_lines(path: Path) -> int:
    """Where the last whole line of a file ends: a process that continues it cuts off what follows."""
    return path.read_bytes().rfind(b"\n") + 1 if path.exists() else 0


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def rank_of(pid: int) -> int | None:
    """RANK in a process's environment; None for one that has not begun to train."""
    try:
        environment = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        command = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return None
    value = next((entry[5:] for entry in environment if entry.startswith(b"RANK=")), b"")
    return int(value) if value.isdigit() and b"mm_train.train" in command else None


def alive(pid: int) -> bool:
    """Does a process run (a zombie does not)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def send(pid: int, number: int) -> None:
    """A signal, to a process that may be gone."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
