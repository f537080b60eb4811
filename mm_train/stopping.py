"""A run asked to stop: by SIGTERM, SIGUSR1 or a file named STOP in the run folder. Torch-free.

    with StopRequest(run_dir, is_main) as stop:
        for step in steps:
            ...                            # stop.wanted() rides on the step's all-reduce
            if any_rank_wants_to_stop:     # the same step on every rank
                save a checkpoint; stop.honoured(); leave with STOPPED

Signals reach ranks at different times, and some ranks not at all, so no rank stops by itself: what `wanted` says is
summed over all ranks, and they leave together after one common step. The file is for those who cannot reach the
processes (another machine, a batch system), and for a signal that would come before Python can take it.

Ctrl-C (SIGINT) is left alone: whoever presses it wants the prompt back now, and a checkpoint can take minutes. It ends
the run at once, and the same command continues from the last checkpoint; `touch RUN/STOP` ends it without a loss.
"""

import contextlib
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOPPED = 75  # exit status, sysexits.h EX_TEMPFAIL: the same command continues. Not 0: the next stage must not start
SIGNALS = (signal.SIGTERM, signal.SIGUSR1)
SAME_REQUEST_SECONDS = 5.0  # a launcher and a process group often deliver one request twice


class StopRequest:
    """Remembers what asked this process to stop. Make it before anything slow is imported.

    The same signal again, later than SAME_REQUEST_SECONDS after the first, has its default action: it ends the process.
    Another one does not: batch systems send SIGUSR1 before the time limit and SIGTERM at it.

    Args:
        run_dir: the run folder; it need not exist yet.
        is_main: whether this rank looks for the file; at most every `poll_seconds`.
    """

    def __init__(self, run_dir: str | Path, is_main: bool, poll_seconds: float = 1.0) -> None:
        self.file = Path(run_dir) / "STOP"
        self._reason: str | None = None
        self._first: dict[int, float] = {}  # when each signal came for the first time
        self._poll_seconds = poll_seconds if is_main else None
        self._looked = -float("inf")
        self._before: dict[int, Any] = {number: signal.signal(number, self._on_signal) for number in SIGNALS}

    def wanted(self) -> str | None:
        """What asked this rank to stop, in words; None when nothing did. Cheap enough for every step."""
        if self._reason is None and self._poll_seconds is not None:
            now = time.monotonic()
            if now - self._looked >= self._poll_seconds:
                self._looked = now
                if self._file_is_there():
                    self._reason = f"the file {self.file}"
        return self._reason

    def honoured(self) -> None:
        """The checkpoint is written: take the file away, or the same command would stop again at its first step."""
        if self._poll_seconds is not None:
            with contextlib.suppress(OSError):  # the run is saved all the same, and the next stop names the file
                self.file.unlink()

    def close(self) -> None:
        """Give the signals back to whoever had them. Safe to call more than once."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def __enter__(self) -> "StopRequest":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _file_is_there(self) -> bool:
        try:
            return self.file.exists()
        except OSError:  # a file system that is gone for a moment asks for nothing
            return False

    def _on_signal(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if number not in self._first:
            if not self._first:
                self._reason = signal.Signals(number).name
            self._first[number] = now
        elif now - self._first[number] > SAME_REQUEST_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
