"""A rank that hangs is found, says where, and ends the run. Torch-free.

    with Watchdog(run_dir, groups.rank, groups.world, cfg.faults.hang_seconds) as watchdog:
        watchdog.beat(step, "forward")     # whenever something was done, validation and checkpoints included

When no beat comes for that long, the process prints which ranks are where, writes the stacks of all its threads to
stderr and to RUN/stacks/rank-00003.txt, and leaves with HUNG; the launcher ends the other ranks, and the same command
continues from the last checkpoint. Usually one rank hangs and the others wait for it in a collective, so that all of
them trip: what each says of the others (from RUN/heartbeat/rank-00003.json, kept by every rank) points at the first.

Two watchers, since one can be stuck as well. A thread of Python sees a main thread that waits in C code, as
collectives do. Code that holds Python's lock stops that thread too; then a timer of faulthandler, which needs no lock,
dumps the stacks to stderr and ends the process with status 1. A process that was suspended for longer than
`hang_seconds` counts as hung.
"""

import contextlib
import faulthandler
import json
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterable
from pathlib import Path
from typing import Any

HUNG = 70  # exit status, sysexits.h EX_SOFTWARE
BACKSTOP_SECONDS = 20.0  # that the timer without Python's lock waits longer
HEARTBEAT_SECONDS = 5.0  # between two writings of the heartbeat file
NAMED_RANKS = 8  # that a message names at most
STDERR = 2  # the descriptor itself, whatever Python made of sys.stderr
LEFT = "left"  # the phase in the last heartbeat of a rank that was not killed


class Watchdog:
    """Ends the process when `beat` was not called for `seconds`; 0: never.

    Args:
        run_dir: the run folder; `stacks/` and `heartbeat/` are made in it. Heartbeats are only written once it exists,
            so that a start which fails at its inputs leaves nothing behind.
        rank, world: this process and how many there are.
        seconds: without a beat, from the construction on.
    """

    def __init__(self, run_dir: str | Path, rank: int, world: int, seconds: float) -> None:
        self.rank, self.world, self.seconds = rank, world, seconds
        self._folder = Path(run_dir)
        self._last: tuple[float, int, str] = (time.monotonic(), 0, "start")  # when, step, phase
        self._closing = threading.Event()
        self._threads: list[threading.Thread] = []
        if seconds > 0:
            self._arm_backstop()
            # Files are written by a thread of their own: a file system that stalls must not pass for a hang.
            for work in (self._watch, self._write_heartbeats):
                self._threads.append(threading.Thread(target=work, name=f"watchdog {work.__name__}", daemon=True))
                self._threads[-1].start()

    def beat(self, step: int, phase: str) -> None:
        """Progress: `phase` of `step` (counted from 1) begins. Costs less than a microsecond."""
        self._last = (time.monotonic(), step, phase)

    def close(self) -> None:
        """Stop watching. Safe to call more than once."""
        self._closing.set()
        for thread in self._threads:
            thread.join(1)
        if self._threads:
            faulthandler.cancel_dump_traceback_later()
            self._write_heartbeat(self._last[1], LEFT)
        self._threads = []

    def __enter__(self) -> "Watchdog":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _watch(self) -> None:
        """Until closing: see to it that beats come, and put the backstop off."""
        interval = min(5.0, self.seconds / 10)
        while not self._closing.wait(interval):
            since, step, phase = self._last
            waited = time.monotonic() - since
            if waited >= self.seconds and not self._closing.is_set():
                self._trip(waited, step, phase)
            self._arm_backstop()

    def _arm_backstop(self) -> None:
        """Count anew: if nothing of Python runs for so long, faulthandler's own thread ends the process."""
        with contextlib.suppress(ValueError, OSError):
            faulthandler.dump_traceback_later(self.seconds + BACKSTOP_SECONDS, exit=True, file=STDERR)

    def _trip(self, waited: float, step: int, phase: str) -> None:
        """Say where this rank and the others are, and leave at once: what is stuck cannot be closed in order."""
        # Reading and writing may hang as well, on the very file system that is to blame: the backstop ends that.
        with contextlib.suppress(ValueError, OSError):
            faulthandler.dump_traceback_later(BACKSTOP_SECONDS, exit=True, file=STDERR)
        file = self._folder / "stacks" / f"rank-{self.rank:05d}.txt"
        others = f"; {found}" if (found := self._others(step, phase)) else ""
        line = f"rank {self.rank}: no progress for {waited:.0f} s in {phase} of step {step}; stacks in {file}{others}"
        text = f"{line}\n{stacks(leave_out=self._threads)}"
        with contextlib.suppress(ValueError, OSError):
            print(text, file=sys.stderr, flush=True)  # in one piece: other ranks write there as well
        with contextlib.suppress(OSError):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
        os._exit(HUNG)

    def _others(self, step: int, phase: str) -> str:
        """The ranks that are elsewhere than this one, those that are furthest behind first."""
        ranks = [rank for rank in range(self.world) if rank != self.rank]
        beats = {rank: read_heartbeat(self._folder, rank) for rank in ranks}
        return compare(step, phase, beats, time.time(), silent_after=max(self.seconds / 2, 3 * self._heartbeat_pause()))

    def _heartbeat_pause(self) -> float:
        return min(HEARTBEAT_SECONDS, self.seconds / 5)

    def _write_heartbeats(self) -> None:
        while True:
            _, step, phase = self._last
            self._write_heartbeat(step, phase)
            if self._closing.wait(self._heartbeat_pause()):
                return

    def _write_heartbeat(self, step: int, phase: str) -> None:
        """Not fsynced and never an error: it only has to be right most of the time."""
        path = heartbeat_file(self._folder, self.rank)
        beat = {"step": step, "phase": phase, "time": time.time(), "pid": os.getpid()}
        with contextlib.suppress(OSError):
            path.parent.mkdir(exist_ok=True)  # fails as long as there is no run folder
            new = path.with_suffix(".new")
            new.write_text(json.dumps(beat) + "\n")
            os.replace(new, path)


def stacks(leave_out: Iterable[threading.Thread] = ()) -> str:
    """Where every thread of Python is, the main one first."""
    names = {thread.ident: thread.name for thread in threading.enumerate()}
    hidden = {thread.ident for thread in leave_out}
    frames = {ident: frame for ident, frame in sys._current_frames().items() if ident not in hidden}
    main = threading.main_thread().ident
    parts = []
    for ident in sorted(frames, key=lambda ident: ident != main):
        lines = "".join(traceback.format_stack(frames[ident])).rstrip()
        parts.append(f"thread {names.get(ident, ident)} (most recent call last):\n{lines}")
    return "\n".join(parts)


def heartbeat_file(run_dir: Path, rank: int) -> Path:
    """{"step", "phase", "time": seconds since 1970 when it was written, "pid"} of a rank."""
    return run_dir / "heartbeat" / f"rank-{rank:05d}.json"


def read_heartbeat(run_dir: Path, rank: int) -> dict[str, Any] | None:
    """The last heartbeat of a rank; None when there is none that can be read."""
    try:
        beat = json.loads(heartbeat_file(run_dir, rank).read_text())
        return {"step": int(beat["step"]), "phase": str(beat["phase"]), "time": float(beat["time"])}
    except (OSError, ValueError, KeyError, TypeError):
        return None


def compare(step: int, phase: str, beats: dict[int, dict[str, Any] | None], now: float, silent_after: float) -> str:
    """Which other ranks are not in `phase` of `step`, or have written no heartbeat for `silent_after` seconds.

    Those furthest behind come first; "" when all are where this one is.
    """
    found: list[tuple[tuple[int, int, int], str]] = []
    for rank, beat in beats.items():
        if beat is None:
            found.append(((-1, 0, rank), f"rank {rank} has no heartbeat"))
            continue
        if beat["phase"] == LEFT:
            found.append(((beat["step"], 0, rank), f"rank {rank} has left in step {beat['step']}"))
            continue
        silent = now - beat["time"]
        if silent > silent_after:  # suspended, killed, or its machine is gone; it may have come further since
            text = f"rank {rank} is silent since {beat['phase']} of step {beat['step']}, {silent:.0f} s ago"
            found.append(((beat["step"], 0, rank), text))
        elif (beat["step"], beat["phase"]) != (step, phase):
            still = " still" if beat["step"] < step else ""
            found.append(((beat["step"], 1, rank), f"rank {rank} is{still} in {beat['phase']} of step {beat['step']}"))
    texts = [text for _, text in sorted(found)]
    more = [f"{len(texts) - NAMED_RANKS} more ranks differ"] if len(texts) > NAMED_RANKS else []
    return ", ".join(texts[:NAMED_RANKS] + more)
