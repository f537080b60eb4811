"""What the chosen steps spend their time on: a trace to look at, and the top of it in words.

    profile.steps=10-12   ->   RUN/profile/rank-00000.trace.json.gz    for chrome://tracing or ui.perfetto.dev
                               RUN/profile/top.txt                     operators by their own time, also in the log

Only the main rank records. The ranks run one program in lockstep, so that one shows them all; where it waits for the
others the wait stands under its collectives. A trace has tens to hundreds of MB, and recording costs time.
"""

import gzip
import shutil
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity

from mm_train.cli import first_line

TOP = 25  # operators in top.txt
SHOWN = 10  # of them in the log
STEP = "training step"  # the mark of a step in the trace
REST = "(Python, waiting and what is no operator)"


class Profiler:
    """Records the steps `steps` ("10-12", "10" or ""), counted from 1. Does nothing when empty or not on the main rank.

    A failure to record or to write (a full disk, say) is told and ends nothing but the profile.

    Args:
        steps: config's profile.steps, checked there.
        run_dir: the run folder.
        rank: this process; rank 0 records.
        device: where training runs; on a GPU its kernels are recorded too.
        say: takes lines for the log.
        total_steps: of the run; steps beyond them are told at once. None: not known.
    """

    def __init__(
        self,
        steps: str,
        run_dir: str | Path,
        rank: int,
        device: torch.device,
        say: Callable[[str], None],
        total_steps: int | None = None,
    ) -> None:
        first, _, last = steps.partition("-")
        self.first, self.last = (int(first), int(last or first)) if steps and rank == 0 else (0, 0)
        self.folder = Path(run_dir) / "profile"
        self.trace = self.folder / f"rank-{rank:05d}.trace.json.gz"
        self._device, self._say, self._steps = device, say, steps
        self._recorded = 0
        self._torch: Any = None
        self._mark: Any = None
        if total_steps is not None and self.last > total_steps:
            beyond = f"the run ends at step {total_steps} (profile.steps {steps})"
            if self.first > total_steps:
                self.last = 0
                say(f"warning: no profile: {beyond}")
            else:
                self.last = total_steps
                say(f"warning: the profile will be shorter: {beyond}")

    def begin(self, step: int) -> None:
        """`step`, counted from 1, begins."""
        if not self.last:
            return
        if step > self.last and self._torch is None:
            self._say(f"warning: no profile: steps {self._steps} are over, this is step {step} (profile.steps)")
            self.last = 0
        elif step >= self.first:
            self._surviving(self._begin)

    def end(self, step: int) -> None:
        """`step` is done, with everything that belongs to it."""
        if self._torch is not None:
            self._surviving(self._end)
            if step >= self.last:
                self._surviving(self._write)

    def close(self) -> None:
        """The run is over: what was recorded is written even if some steps never came. Safe to call more than once."""
        if self._torch is not None:
            self._surviving(self._write)
        elif self.last:
            self._say(f"warning: no profile: the run ended before step {self.first} (profile.steps {self._steps})")
            self.last = 0

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _begin(self) -> None:
        if self._torch is None:
            activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (self._device.type == "cuda")
            self._torch = torch.profiler.profile(activities=activities, record_shapes=True, profile_memory=True)
            self._torch.start()
        self._mark = torch.profiler.record_function(STEP)
        self._mark.__enter__()

    def _end(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the kernels of this step belong into it
        if self._mark is not None:
            self._mark.__exit__(None, None, None)
            self._mark = None
            self._recorded += 1

    def _write(self) -> None:
        recorder, self._torch, self.last = self._torch, None, 0
        if self._mark is not None:  # in the middle of a step that did not end
            self._mark.__exit__(None, None, None)
            self._mark = None
        recorder.stop()
        rows = own_times(recorder.key_averages(), self._device.type)
        table = render(rows, max(1, self._recorded), self._device.type)
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "top.txt").write_text("\n".join(table) + "\n")
        for line in [
            *table[: 2 + SHOWN],
            f"profile: {self.trace}, and more of this table in {self.folder / 'top.txt'}",
        ]:
            self._say(line)
        plain, packed = self.trace.with_suffix(""), self.trace.with_suffix(".partial")
        try:
            recorder.export_chrome_trace(str(plain))
            with plain.open("rb") as source, gzip.open(packed, "wb", compresslevel=5) as target:
                shutil.copyfileobj(source, target)
            packed.replace(self.trace)
        finally:
            plain.unlink(missing_ok=True)
            packed.unlink(missing_ok=True)

    def _surviving(self, work: Callable[[], None]) -> None:
        try:
            work()
        except Exception as error:  # the profiler raises errors of many kinds, and none may end a training run
            self._say(f"warning: the profile fails, training goes on: {first_line(error)}")
            self._torch, self._mark, self.last = None, None, 0


@dataclass(frozen=True)
class Row:
    """An operator: its own time without what it calls, and how often it ran, over all recorded steps."""

    name: str
    seconds: float
    calls: int


def own_times(averages: Iterable[Any], device_type: str) -> list[Row]:
    """Operators by their own time on the device ("cuda": of the kernels they start; "cpu"), the longest first."""
    rows = []
    for event in averages:
        if event.device_type != DeviceType.CPU:  # kernels, which their operators count already
            continue
        microseconds = event.self_device_time_total if device_type == "cuda" else event.self_cpu_time_total
        if microseconds > 0:
            rows.append(Row(REST if event.key == STEP else event.key, microseconds / 1e6, event.count))
    return sorted(rows, key=lambda row: -row.seconds)


def render(rows: list[Row], steps: int, device_type: str) -> list[str]:
    """The lines of the table: a title, the heading, and the first TOP rows."""
    total = sum(row.seconds for row in rows)
    where = "GPU" if device_type == "cuda" else "CPU"
    lines = [
        f"profile of {steps} step(s), {total / steps:.3f} s of {where} a step; operators by their own time:",
        f"{'ms a step':>10} {'share':>6} {'calls a step':>12}  operator",
    ]
    for row in rows[:TOP]:
        share = row.seconds / total
        lines.append(f"{row.seconds / steps * 1e3:>10.2f} {share:>6.1%} {row.calls / steps:>12.5g}  {row.name}")
    return lines
