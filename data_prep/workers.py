"""Processes that work through independent tasks, with a progress bar over all of them."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ProcessPoolExecutor, wait
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

REFRESH_SECONDS = 0.5
_counters: Any = None  # in a worker: what it shares with its parent; there is no other way to hand it over


@dataclass
class Pool:
    """Worker processes, and how many bytes of text and tokens they have done."""

    executor: ProcessPoolExecutor
    counters: Any

    def run(self, title: str, tasks: Sequence[tuple[Callable[..., Any], tuple[Any, ...]]], total_bytes: int) -> None:
        """Carry out `tasks`, showing MB/s, tokens/s and the time left. The first error ends the wait and is raised."""
        self.counters[0] = self.counters[1] = 0
        pending = {self.executor.submit(function, *arguments) for function, arguments in tasks}
        start = time.monotonic()
        with tqdm(desc=title, total=total_bytes, unit="B", unit_scale=True, disable=None) as bar:
            while pending:
                done, pending = wait(pending, REFRESH_SECONDS, FIRST_EXCEPTION)
                for future in done:
                    future.result()
                if self.counters[1]:
                    bar.set_postfix_str(f"{self.counters[1] / (time.monotonic() - start) / 1e6:.2f} M tokens/s", False)
                bar.update(min(self.counters[0], total_bytes) - bar.n)


def advance(num_bytes: int, num_tokens: int = 0) -> None:
    """Tell the parent of this process, if it is a worker, what has been done since the last call."""
    if _counters is not None:
        with _counters.get_lock():
            _counters[0] += num_bytes
            _counters[1] += num_tokens


@contextlib.contextmanager
def processes(count: int) -> Iterator[Pool]:
    """`count` worker processes, spawned: forking is unsafe once a tokenizer has threads."""
    context = multiprocessing.get_context("spawn")
    counters = context.Array("q", 2)
    executor = ProcessPoolExecutor(count, context, _start, (counters,))
    try:
        yield Pool(executor, counters)
    finally:
        executor.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what is queued is not worth waiting for


def _start(counters: Any) -> None:
    """A worker uses one core, and ends at once and silently on Ctrl-C and when its parent is gone, even by kill -9."""
    global _counters
    _counters = counters
    os.environ.update(TOKENIZERS_PARALLELISM="false", RAYON_NUM_THREADS="1", OMP_NUM_THREADS="1")
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
