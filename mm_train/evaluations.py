"""Benchmarks beside training: checkpoints are scored in a process of their own while the next steps run.

Every `evaluate.every` steps the main rank starts `python -m eval.run` on the checkpoint of that step. There is one such
process at a time, it gives way to training, and it ends with it. What it finds goes into metrics.jsonl; when it fails
that is an alert, and training goes on.

A checkpoint is kept from the moment it is published (checkpoint/writer.py holds it) until its scores are in. One that a
killed or stopped run leaves held is scored when the run goes on: eval.run then repeats no benchmark that was finished.
"""

import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mm_train import config
from mm_train.checkpoint.folders import held, let_go, step_of
from mm_train.cli import first_line
from mm_train.files import is_folder
from mm_train.metrics import Metrics
from mm_train.processes import beside, environment_alone

NICE = 10
INCOMPLETE = 3  # exit status of eval.run: all is scored for which there is data
END_SECONDS = 15 * 60  # that the end of a stage waits for the last scores
TERM_SECONDS = 10.0
BEAT_SECONDS = 1.0
TITLE = "evaluation"  # of alerts


class Evaluations:
    """The evaluations of one run. Every method is a no-op on ranks other than the main one.

    `program` is what is run instead of `python -m eval.run`, in tests.
    """

    def __init__(self, cfg: config.Config, metrics: Metrics, is_main: bool, program: list[str] | None = None) -> None:
        self.cfg, self.metrics, self._is_main = cfg, metrics, is_main
        self._program = program or [sys.executable, "-m", "eval.run"]
        self._process: subprocess.Popen[bytes] | None = None
        self._folder = Path()  # of the checkpoint that is read
        self._begun = 0.0

    def resume(self, step: int) -> None:
        """Take up what an earlier process of this run, now at `step`, left: the newest evaluation is done again."""
        if not self._is_main:
            return
        left = [folder for folder in held(Path(self.cfg.run.dir)) if is_folder(folder)]
        for folder in held(Path(self.cfg.run.dir)):
            if not self.cfg.evaluate.every or folder not in left[-1:] or (step_of(folder) or 0) > step:
                let_go(folder)
            else:
                self._start(folder, step)

    def look(self, step: int, published: Path | None = None) -> None:
        """What has come of the evaluation under way, and whether the checkpoint in `published` starts another one."""
        if not self._is_main:
            return
        if self._process is not None and self._process.poll() is not None:
            self._collect(step)
        if published is None or not self._wanted(published):
            return
        if self._process is None:
            self._start(published, step)
        else:
            let_go(published)
            text = f"step {step_of(published)} is not evaluated: that of step {step_of(self._folder)} is not ready"
            self.metrics.alert(step, TITLE, text)

    def finish(self, step: int, beat: Callable[[], object]) -> None:
        """Wait for the last scores, for END_SECONDS at most; `beat` is called meanwhile."""
        if self._process is None:
            return
        self.metrics.say(f"waiting for the evaluation of step {step_of(self._folder)} ({self._out / 'log.txt'})")
        deadline = time.monotonic() + END_SECONDS
        while self._process.poll() is None and time.monotonic() < deadline:
            beat()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(BEAT_SECONDS)
        if self._process.poll() is None:
            self.stop()
            let_go(self._folder)
            text = f"that of step {step_of(self._folder)} took too long for the end of the run: {self._by_hand()}"
            self.metrics.alert(step, TITLE, text)
            return
        self._collect(step)

    def stop(self) -> None:
        """End the one under way; the checkpoint stays held, for the process that goes on. Safe to call at any time."""
        if self._process is None:
            return
        self._process.terminate()
        try:
            self._process.wait(TERM_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

    @property
    def _out(self) -> Path:
        return Path(self.cfg.run.dir) / "eval" / self._folder.name

    def _wanted(self, folder: Path) -> bool:
        step, every = step_of(folder), self.cfg.evaluate.every
        return bool(every and step and step % every == 0)

    def _start(self, folder: Path, step: int) -> None:
        wanted = self.cfg.evaluate
        self._folder, self._begun = folder, time.monotonic()
        words = ["--model", str(folder), "--tasks", wanted.tasks, "--data", wanted.data, "--out", str(self._out)]
        words += ["--limit", str(wanted.limit)] if wanted.limit else []
        only = {} if wanted.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
        try:
            self._out.mkdir(parents=True, exist_ok=True)
            with (self._out / "log.txt").open("wb") as log:
                self._process = subprocess.Popen(
                    beside([*self._program, *words], NICE),
                    env=environment_alone(**only),
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                )
        except OSError as error:
            let_go(folder)
            self.metrics.alert(step, TITLE, f"that of step {step_of(folder)} does not start: {first_line(error)}")

    def _collect(self, step: int) -> None:
        """Record the scores of a process that has ended, or that there are none."""
        assert self._process is not None
        status, self._process = self._process.returncode, None
        let_go(self._folder)
        results = self._results() if status in (0, INCOMPLETE) else None
        if results is None:
            what = f"failed with status {status}: {self._last_words()}"
            if status in (0, INCOMPLETE):
                what = "left no results that can be read"
            text = f"that of step {step_of(self._folder)} {what} ({self._out / 'log.txt'})"
            self.metrics.alert(step, TITLE, text)
            return
        seconds = time.monotonic() - self._begun
        self.metrics.evaluation(step_of(self._folder) or step, **results, seconds=round(seconds, 1))

    def _results(self) -> dict[str, Any] | None:
        """Scores and bits per byte of right answers by benchmark, the scores' average and the limit; None when
        results.json is not what eval.run writes."""
        try:
            found = json.loads((self._out / "results.json").read_text(encoding="utf-8"))
            scores = {name: task["score"] for name, task in found["tasks"].items() if task["score"] is not None}
            bits = {name: task["bits_per_byte"] for name, task in found["tasks"].items() if task.get("bits_per_byte")}
            return {"scores": scores, "average": found["average"], "bits_per_byte": bits, "limit": found["limit"]}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def _last_words(self) -> str:
        try:
            lines = (self._out / "log.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:300] if lines else "it said nothing"

    def _by_hand(self) -> str:
        wanted = self.cfg.evaluate
        limit = f" --limit {wanted.limit}" if wanted.limit else ""
        return f"python -m eval.run --model {self._folder} --tasks {wanted.tasks}{limit} --out {self._out}"
