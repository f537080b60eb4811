"""Processes that work through independent tasks, with a progress bar over all of them.

One worker is this process itself: nothing has to be started, loaded or read twice.
"""

import contextlib
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from tqdm import tqdm

REFRESH_SECONDS = 0.5
ONE_CORE = {"TOKENIZERS_PARALLELISM": "false", "RAYON_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
T = TypeVar("T")
Task = tuple[Callable[..., Any], tuple[Any, ...]]
_report: Callable[[int, int], object] | None = None  # where `advance` tells of bytes and tokens


@dataclass
class Pool:
    """Worker processes, and how many bytes of text and tokens they have done; or none (`executor` None)."""

    executor: ProcessPoolExecutor | None
    counters: Any

    def call(self, function: Callable[..., T], *arguments: Any) -> T:
        """What `function` returns in a worker."""
        if self.executor is None:
            return function(*arguments)
        return self.executor.submit(function, *arguments).result()

    def run(self, title: str, tasks: Sequence[Task], total_bytes: int) -> None:
        """Carry out `tasks`, showing MB/s, tokens/s and the time left. The first error ends the wait and is raised."""
        self.counters[:] = [0, 0]
        with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
            show = _Show(bar, self.counters, time.monotonic())
            if self.executor is None:

                def report(num_bytes: int, num_tokens: int) -> None:
                    _add(self.counters, num_bytes, num_tokens)
                    show()

                with _reporting(report):
                    for function, arguments in tasks:
                        function(*arguments)
                return
            pending = {self.executor.submit(function, *arguments) for function, arguments in tasks}
            while pending:
                done, pending = wait(pending, REFRESH_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                show()


def advance(num_bytes: int, num_tokens: int = 0) -> None:
    """Tell whoever shows the progress of this process what has been done since the last call."""
    if _report is not None:
        _report(num_bytes, num_tokens)


@contextlib.contextmanager
def processes(count: int, forked: bool = False) -> Iterator[Pool]:
    """`count` worker processes; 1: this one, which works on one core while it is the pool.

    They are spawned, as clients of networks and threads do not outlive a fork; `forked`: what they do needs neither,
    and they shall have what this process has loaded when it gives them their first task.
    """
    if count == 1:
        with _environment(ONE_CORE):
            yield Pool(None, [0, 0])
        return
    context = multiprocessing.get_context("fork" if forked and sys.platform == "linux" else "spawn")
    counters = context.Array("q", 2)
    executor = ProcessPoolExecutor(count, context, _start, (counters,))
    try:
        yield Pool(executor, counters)
    finally:
        executor.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what is queued is not worth waiting for


@dataclass
class _Show:
    """Moves a progress bar to what has been counted."""

    bar: tqdm
    counters: Any
    start: float

    def __call__(self) -> None:
        num_bytes, num_tokens = self.counters[:]
        if num_tokens:
            self.bar.set_postfix_str(f"{num_tokens / (time.monotonic() - self.start) / 1e6:.2f} M tokens/s", False)
        self.bar.update(min(num_bytes, self.bar.total) - self.bar.n)


def _add(counters: Any, num_bytes: int, num_tokens: int) -> None:
    counters[0] += num_bytes
    counters[1] += num_tokens


def _add_locked(counters: Any, num_bytes: int, num_tokens: int) -> None:
    with counters.get_lock():
        _add(counters, num_bytes, num_tokens)


@contextlib.contextmanager
def _reporting(report: Callable[[int, int], object]) -> Iterator[None]:
    global _report
    before, _report = _report, report
    try:
        yield
    finally:
        _report = before


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _start(counters: Any) -> None:
    """A worker uses one core, and ends at once and silently on Ctrl-C and when its parent is gone, even by kill -9."""
    global _report
    _report = partial(_add_locked, counters)
    os.environ.update(ONE_CORE)
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
