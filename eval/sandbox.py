"""Runs programs that a model wrote. Each has a process and a session of its own, a temporary folder, limits on time,
memory and file size, no network, no other processes and no way to write elsewhere (eval.sandbox_child), and is killed
as a group.

Where the kernel cannot confine a program (Linux with Landlock and seccomp can), none is run.
"""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.sandbox_child import UNSUPPORTED
from eval.tasks import CannotRunError

CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Limits:
    """What a program may use. `seconds` of a processor; `wall_seconds` is longer, as others use this machine too."""

    seconds: int = 5
    wall_seconds: float = 30.0
    memory: int = 2**30
    file_bytes: int = 2**24


def passes(source: str, limits: Limits | None = None) -> bool:
    """Whether a program runs to its end without an exception. Raises CannotRunError where it cannot be confined."""
    limits = limits or Limits()
    token = secrets.token_hex(16)
    wanted = {"source": source, "token": token, "seconds": limits.seconds, "memory": limits.memory}
    wanted["file_bytes"] = limits.file_bytes
    with tempfile.TemporaryDirectory(prefix="sandbox-", ignore_cleanup_errors=True) as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", str(CHILD), os.path.realpath(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1", "LANG": "C.UTF-8"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(json.dumps(wanted).encode(), timeout=limits.wall_seconds)
        except subprocess.TimeoutExpired:
            return False
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with suppress(OSError):
                        pipe.close()
    if process.returncode == UNSUPPORTED and said != token.encode():
        raise CannotRunError(f"no sandbox on this machine ({said.decode(errors='replace')}): no program is run")
    return process.returncode == 0 and said == token.encode()


class CodeEval:
    """Stands in for the metric `code_eval` of the package `evaluate`, which runs programs without a sandbox."""

    def compute(
        self, references: Sequence[str], predictions: Sequence[Sequence[str]], k: Sequence[int] = (1,)
    ) -> tuple[dict[str, float], list[list[bool]]]:
        """pass@1, the share of candidates that pass their tests, and which do. Raises ValueError for another k."""
        if list(k) != [1]:
            raise ValueError(f"k is {k}; only pass@1 is taken, of one greedy answer")
        programs = [
            f"{candidate}\n{tests}"
            for candidates, tests in zip(predictions, references, strict=True)
            for candidate in candidates
        ]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            passed = iter(list(pool.map(passes, programs)))
        found = [[next(passed) for _ in candidates] for candidates in predictions]
        flat = [value for values in found for value in values]
        return {"pass@1": sum(flat) / len(flat)}, found


@contextmanager
def serving() -> Iterator[None]:
    """While open, `evaluate.load("code_eval")` gives the sandboxed one: lm-eval asks for it when it loads a task."""
    try:
        import evaluate
    except ImportError as error:
        raise CannotRunError(str(error)) from None
    original = evaluate.load

    def load(path: str, *rest: Any, **options: Any) -> Any:
        return CodeEval() if path == "code_eval" else original(path, *rest, **options)

    evaluate.load = load
    try:
        yield
    finally:
        evaluate.load = original
