"""Where the time of a training step goes, phase by phase.

Phases exclude each other: what runs inside another takes its time out of that one (all_to_all out of forward and
backward), so that they add up to the time of the step. On a GPU the phases that compute are timed by events in its
stream: nothing waits for them before somebody reads the sums.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from time import perf_counter
from typing import Any, NamedTuple

import torch

from mm_train.metric_names import PHASES

# On the host's clock on every device, because they are the loop's own time; phases inside them are not told apart.
HOST_PHASES = ("data", "checkpoint", "validation")
UNREAD = 4096  # event pairs that may wait before finished ones are added up


class _Mark(NamedTuple):
    """A moment: on the host's clock and, on a GPU, in its stream."""

    seconds: float
    event: Any  # torch.cuda.Event | None


class Clock:
    """Seconds per phase since the last `reset`, of this rank.

    One phase is innermost at a time. The threads of the forward and the backward pass may share a clock because they
    take turns; other threads may not.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._open: list[str] = []
        self._last = _Mark(0.0, None)
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._unread: deque[tuple[str, Any, Any]] = deque()  # phase, first and last event

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the block as phase `name`, one of PHASES."""
        assert name in self._seconds, f"unknown phase {name}"
        if self._open and self._open[-1] in HOST_PHASES:
            yield
            return
        self._mark()
        self._open.append(name)
        try:
            yield
        finally:
            self._mark()
            self._open.pop()

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase; waits for the GPU to finish what was timed."""
        self._read(wait=True)
        return dict(self._seconds)

    def reset(self) -> None:
        """Begin again at zero, also in the middle of a phase."""
        self._seconds = dict.fromkeys(PHASES, 0.0)
        self._unread.clear()
        self._last = self._now()

    def _mark(self) -> None:
        """End a stretch of time: it belongs to the innermost phase, if there is one."""
        now = self._now()
        if self._open:
            name = self._open[-1]
            if self._on_gpu and name not in HOST_PHASES:
                self._unread.append((name, self._last.event, now.event))
                if len(self._unread) > UNREAD:
                    self._read(wait=False)
            else:
                self._seconds[name] += now.seconds - self._last.seconds
        self._last = now

    def _now(self) -> _Mark:
        event = None
        if self._on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()  # in the current stream of the calling thread, the one that computes
        return _Mark(perf_counter(), event)

    def _read(self, wait: bool) -> None:
        """Add up the stretches whose last event has happened; `wait` for all."""
        while self._unread:
            name, first, last = self._unread[0]
            if wait:
                last.synchronize()
            elif not last.query():
                return
            self._seconds[name] += first.elapsed_time(last) / 1000  # from milliseconds
            self._unread.popleft()


def phase(clock: Clock | None, name: str) -> AbstractContextManager[None]:
    """`clock.phase(name)`, or nothing where no time is taken."""
    return nullcontext() if clock is None else clock.phase(name)
