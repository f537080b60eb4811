"""Start N training processes on this machine, pass signals on, and leave none behind. launch/local.sh runs it.

    python -m launch.local NUM_PROCESSES FILE.yaml ... key=value ...
    python -m launch.local NUM_PROCESSES -m MODULE ...       another command than training, eval.run for one

SIGTERM and SIGUSR1, and SIGHUP of a terminal that closes, ask every rank to write a checkpoint and leave; Ctrl-C ends
them at once. When a rank fails the others get SIGTERM, and SIGKILL after GRACE_SECONDS: without it they would wait for
it. The exit status is that of the rank that failed first (128 + N for signal N), else 75 when the ranks stopped on
request, else 0. If this process itself is killed by SIGKILL, the kernel kills the ranks (Linux: PR_SET_PDEATHSIG).

Only the standard library, so that it starts at once.
"""

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time

from mm_train.processes import dies_with
from mm_train.stopping import STOPPED

USAGE = "usage: launch/local.sh NUM_PROCESSES FILE.yaml ... key=value ... (or: NUM_PROCESSES -m MODULE ...)"
MODULE = ["-m", "mm_train.train"]
GRACE_SECONDS = 10.0  # between SIGTERM and SIGKILL
CTRL_C_SECONDS = 2.0  # a terminal sends SIGINT to every process itself; those that did not get it do so after this
PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGHUP: signal.SIGTERM}


def main(argv: list[str]) -> int:
    if not argv or not argv[0].isdecimal() or int(argv[0]) < 1:
        print(USAGE, file=sys.stderr)
        return 2
    with Wakeup([*PASSED_ON, signal.SIGINT, signal.SIGCHLD]) as wakeup:
        ranks = Ranks()
        try:
            module = [] if argv[1:2] == ["-m"] else MODULE
            ranks.start(int(argv[0]), [sys.executable, *module, *argv[1:]])
            return ranks.wait(wakeup)
        finally:
            ranks.send(signal.SIGKILL)  # nobody is left, unless this program has a fault


class Wakeup:
    """Signals as something to wait for: nothing happens inside a handler.

    A signal that is ignored, as SIGHUP is under nohup, stays ignored.
    """

    def __init__(self, numbers: list[signal.Signals]) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)
        self._fd_before = signal.set_wakeup_fd(self._write.fileno(), warn_on_full_buffer=False)
        taken = [n for n in numbers if n == signal.SIGCHLD or signal.getsignal(n) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, lambda *_: None) for number in taken}

    def wait(self, seconds: float | None) -> list[int]:
        """The signals that came; [] after `seconds` (None: for ever) without any."""
        select.select([self._read], [], [], seconds)
        with contextlib.suppress(BlockingIOError):
            return list(self._read.recv(4096))
        return []

    def __enter__(self) -> "Wakeup":
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd_before)
        self._read.close()
        self._write.close()


class Ranks:
    """The processes of one run."""

    def __init__(self) -> None:
        self._running: dict[int, subprocess.Popen] = {}

    def start(self, number: int, command: list[str]) -> None:
        """`command` once for each rank, which finds its place in the environment as under torchrun."""
        shared = {"WORLD_SIZE": str(number), "MASTER_ADDR": "127.0.0.1"}
        shared["MASTER_PORT"] = os.environ.get("MASTER_PORT") or str(free_port())
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | shared
        for rank in range(number):
            own = {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            # A rank must not outlive this process, whatever ends it. preexec_fn is safe: there is one thread.
            self._running[rank] = subprocess.Popen(command, env=environment | own, preexec_fn=dies_with(os.getpid()))

    def wait(self, wakeup: Wakeup) -> int:
        """Until all have ended; returns the exit status for all of them."""
        failed: int | None = None  # the status of the first
        stopped = False
        next_signal: tuple[float, int] | None = None  # when the ranks get which
        while self._running:
            for number in wakeup.wait(max(0.0, next_signal[0] - time.monotonic()) if next_signal else None):
                if number in PASSED_ON:
                    self.send(PASSED_ON[signal.Signals(number)])
                elif number == signal.SIGINT:
                    failed = failed or 128 + signal.SIGINT
                    if next_signal:  # asked twice
                        next_signal = (time.monotonic(), signal.SIGKILL)
                    else:
                        next_signal = (time.monotonic() + CTRL_C_SECONDS, signal.SIGINT)
            for rank, code in self._ended():
                stopped |= code == STOPPED
                if code not in (0, STOPPED) and failed is None:
                    failed = code if code > 0 else 128 - code
                    if code < 0:
                        tell(f"rank {rank} was ended by {signal.Signals(-code).name}", others=bool(self._running))
                    self.send(signal.SIGTERM)
                    next_signal = (time.monotonic() + GRACE_SECONDS, signal.SIGKILL)
            if next_signal and time.monotonic() >= next_signal[0]:
                self.send(next_signal[1])
                next_signal = (time.monotonic() + GRACE_SECONDS, signal.SIGKILL)
        return failed if failed is not None else STOPPED if stopped else 0

    def send(self, number: int) -> None:
        """Send a signal to every rank that is left."""
        for process in self._running.values():
            process.send_signal(number)

    def _ended(self) -> list[tuple[int, int]]:
        """(rank, exit status or -signal) of those that ended since the last call. Of several, those ended by a signal
        come first: an error of the others is its consequence."""
        codes = {rank: process.poll() for rank, process in self._running.items()}
        ended = [(rank, code) for rank, code in codes.items() if code is not None]
        for rank, _ in ended:
            del self._running[rank]
        return sorted(ended, key=lambda item: item[1])


def tell(text: str, others: bool) -> None:
    """One line on stderr; a terminal that is gone is no reason to stop watching."""
    with contextlib.suppress(OSError):
        print(f"launch/local.sh: {text}{'; ending the others' if others else ''}", file=sys.stderr, flush=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
