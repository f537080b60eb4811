"""Processes that this project starts: the training command on N ranks, and children that do not outlive their parent.

Only the standard library, so that a launcher starts at once.
"""

import ctypes
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LAUNCHER = ROOT / "launch" / "local.py"
PR_SET_PDEATHSIG = 1
OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def training_command(words: Sequence[str], ranks: int) -> list[str]:
    """The command that trains with these configs and overrides on `ranks` processes of this machine.

    More than one are started by launch/local.py, which is found where the project is.
    """
    start = ["mm_train.train"] if ranks == 1 else ["launch.local", str(ranks)]
    return [sys.executable, "-m", *start, *words]


def beside(command: Sequence[str], nice: int = 0) -> list[str]:
    """`command` as a child of this process that the kernel ends with it, and that gives way to it by `nice`.

    It becomes that program through this file: a process with many threads and much memory can start it without running
    Python between fork and exec.
    """
    return [sys.executable, "-I", __file__, str(os.getpid()), str(nice), *command]


def dies_with(parent: int) -> Callable[[], None]:
    """What a new process does first: ask the kernel for SIGKILL when `parent` dies."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)  # Linux only

    def prepare() -> None:
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
            if os.getppid() != parent:  # it died in between
                os._exit(128 + signal.SIGKILL)

    return prepare


def environment_alone(**more: str) -> dict[str, str]:
    """This process's environment for a program that is no rank of its run, and finds the project from any folder."""
    kept = {name: value for name, value in os.environ.items() if name not in OF_A_RANK}
    paths = [str(ROOT), *filter(None, [kept.get("PYTHONPATH")])]
    return kept | {"PYTHONPATH": os.pathsep.join(paths)} | more


if __name__ == "__main__":
    dies_with(int(sys.argv[1]))()
    os.nice(int(sys.argv[2]))
    os.execvp(sys.argv[3], sys.argv[3:])
