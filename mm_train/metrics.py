"""What a run tells the world: metrics.jsonl, a readable log, and Weights & Biases. Torch-free.

metrics.jsonl is the record, one JSON object a line, and the only thing that the report reads. The log lines on the
console and in train.log are for people; W&B is for those who have it. Only this file imports wandb.
"""

import json
import math
import os
import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from tqdm import tqdm

from mm_train.cli import UserError, first_line
from mm_train.log_lines import (
    Record,
    alert_line,
    clock,
    evaluation_line,
    number,
    rollback_line,
    run_line,
    skipped_line,
    train_line,
    validation_line,
)
from mm_train.metric_names import named
from mm_train.rules import CHOICES

LEVELS = ("info", "warn", "error")  # of an alert
EACH_COUNTS = ("run", "rollback", "stopped")  # kinds of which no line replaces an earlier one


class Metrics:
    """The log of one run of one stage. Every method is a no-op on ranks other than the main one.

    Once the run folder is open, no failure to record (a full disk, W&B gone) raises: it is said once on stderr and
    training goes on.

    Args:
        run_dir: the run folder; made if it is missing. Lines are appended, so that a resumed run continues its record.
        is_main: whether this rank writes.
        wandb_mode: config's log.wandb. "online", "offline", "disabled", or "auto": what WANDB_MODE says, else online
            for a user who is logged in to W&B and offline for others.
        config: the resolved configuration, shown by W&B.
        project: W&B project.
        run_name: W&B name of the run.

    Raises:
        UserError: the run folder cannot be written, wandb_mode is not one of these, or it is "online" or "offline" and
            wandb is not installed.
    """

    def __init__(
        self,
        run_dir: str | Path,
        *,
        is_main: bool,
        wandb_mode: str,
        config: dict[str, Any],
        project: str,
        run_name: str,
    ) -> None:
        self._is_main = is_main
        self._said: set[str] = set()
        self._facts: Record = {}
        self._alerts = 0
        self._wandb: Any = None
        if not is_main:
            return
        if wandb_mode not in (modes := CHOICES["log.wandb"]):
            raise UserError(f'unknown W&B mode "{wandb_mode}": it is one of {", ".join(map(str, modes))}')
        folder = Path(run_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            drop_torn_line(folder / "metrics.jsonl")
            self._jsonl: TextIO = open(folder / "metrics.jsonl", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
            self._log: TextIO = open(folder / "train.log", "a", buffering=1, encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"cannot write the run folder {folder}: {error.strerror or error}") from None
        self._wandb = self._start_wandb(folder, wandb_mode, config, project, run_name)

    def run(self, **facts: Any) -> None:
        """Record what this run is: stage, model, total_steps, world, global_batch_tokens, params_total and so on."""
        self._facts = {"kind": "run", "time": datetime.now().astimezone().isoformat(), **facts}
        if self._record(self._facts):
            self.say(run_line(self._facts))

    def train(self, step: int, **values: Any) -> None:
        """Record one training interval that ended after `step`.

        Known to the log line, W&B and the report are the keys of metric_names.NAMES["train"] (their meaning:
        statistics.Interval.values; `lr`, `grad_norm` and `grad_norm_parts` before clipping, `seconds` since the process
        started, `skipped_steps` and `rollbacks` of the stage so far) and `expert_load`: for each layer the share of the
        routed tokens that each expert got. None: not measured.
        """
        if values.get("expert_load") is not None:  # five decimals are plenty, and half the file
            values["expert_load"] = np.asarray(values["expert_load"], dtype=float).round(5).tolist()
        record = {"kind": "train", "step": step, **values}
        if self._record(record):
            self.say(train_line(record, self._facts))
            self._track(record)

    def validation(self, step: int, source: str, **values: Any) -> None:
        """Record the held-out loss (nats per token) and bits per byte of one source."""
        record = {"kind": "validation", "step": step, "source": source, **values}
        if self._record(record):
            self.say(validation_line(record, self._facts))
            self._track(record)

    def evaluation(self, step: int, **values: Any) -> None:
        """Record the benchmark scores of the checkpoint of `step`, which come when training is further on.

        `scores` by benchmark, their `average`, `bits_per_byte` of right answers by benchmark, the `limit` of items and
        the `seconds` it took.
        """
        record = {"kind": "evaluation", "step": step, **values}
        if self._record(record):
            self.say(evaluation_line(record, self._facts))
            self._track(record)

    def checkpoint(self, step: int, **values: Any) -> None:
        """Record a finished checkpoint: seconds it took, stalled_seconds that training stood still, bytes on disk."""
        record = {"kind": "checkpoint", "step": step, **values}
        if self._record(record):
            self._track(record)

    def skipped(self, step: int, loss: float, grad_norm: float | None, skipped_steps: int) -> None:
        """Record that `step` (as it would have been numbered) made no update, and how many did not in this stage."""
        shown = {"loss": number(loss, ".3f"), "gradient norm": number(grad_norm, ".2f")}
        reason = ", ".join(f"{name} {value}" for name, value in shown.items() if value is not None)
        values = {"loss": loss, "grad_norm": grad_norm, "skipped_steps": skipped_steps, "reason": reason}
        record = {"kind": "skipped", "step": step, **values}
        if self._record(record):
            self.say(skipped_line(record, self._facts))
            self._track(record)

    def rollback(self, step: int, to_step: int, reason: str, rollbacks: int) -> None:
        """Record that training left `step` for an earlier checkpoint, and how often it did in this stage."""
        record = {"kind": "rollback", "step": step, "to_step": to_step, "reason": reason, "rollbacks": rollbacks}
        if self._record(record):
            self.say(rollback_line(record, self._facts))
            self._track(record)

    def stopped(self, step: int, reason: str) -> None:
        """Record that this process ends after `step` because it was asked to; the stage is not done."""
        if self._record({"kind": "stopped", "step": step, "reason": reason}):
            self.say(f"stopped after step {step}: {reason}; the same command goes on from here")

    def alert(self, step: int, title: str, text: str, level: str = "warn") -> None:
        """Tell a person of something: on the console, in the record, and by W&B's alerts (e-mail, Slack).

        `level` is one of LEVELS. `title` is the same for the same trouble, `text` has the numbers.
        """
        assert level in LEVELS, f"unknown level {level}"
        self._alerts += 1
        values = {"title": title, "text": text, "level": level, "alerts": self._alerts}
        record = {"kind": "alert", "step": step, **values}
        if self._record(record):
            self.say(alert_line(record, self._facts))
            self._track(record)
            if self._wandb is not None:
                with self._surviving("W&B"):
                    self._wandb.alert(title=title, text=f"step {step}: {text}", level=level.upper())

    def done(self, step: int, **values: Any) -> None:
        """Record the end of the stage."""
        record = {"kind": "done", "step": step, **values}
        if self._record(record):
            seconds = record.get("seconds")
            self.say(f"done after {step} steps" + (f" in {clock(seconds)}" if seconds is not None else ""))

    def say(self, text: str) -> None:
        """One line on the console (above a progress bar, if there is one) and, with the time of day, in train.log."""
        if self._is_main:
            with self._surviving("the console"):
                tqdm.write(text)
                sys.stdout.flush()  # into a pipe or a log file it would otherwise come in blocks
            with self._surviving("train.log"):
                self._log.write(f"{time.strftime('%H:%M:%S')}  {text}\n")

    def close(self) -> None:
        """Flush and close everything. Safe to call more than once."""
        if not self._is_main:
            return
        if self._wandb is not None:
            with self._surviving("W&B"):
                self._wandb.finish()
            self._wandb = None
        for stream in (self._jsonl, self._log):
            with self._surviving("the log"):
                stream.close()

    def _record(self, record: Record) -> bool:
        """Append one line to metrics.jsonl; returns whether this rank is the one that logs."""
        if self._is_main:
            with self._surviving("metrics.jsonl"):
                self._jsonl.write(json.dumps(plain(record), allow_nan=False) + "\n")
        return self._is_main

    def _track(self, record: Record) -> None:
        if self._wandb is not None:
            with self._surviving("W&B"):
                shown = {name: value for name, value in named(plain(record)).items() if value is not None}
                self._wandb.log({"step": record["step"], **shown})

    @contextmanager
    def _surviving(self, what: str, complaint: str = "") -> Iterator[None]:
        """Run the block; a failure of `what` is said once and goes no further."""
        try:
            yield
        except Exception as error:  # W&B raises errors of many kinds, and none of them may end a training run
            if what not in self._said:
                self._said.add(what)
                complaint = complaint or f"{what} fails, training goes on"
                print(f"warning: {complaint}: {first_line(error)}", file=sys.stderr, flush=True)

    def _start_wandb(self, folder: Path, mode: str, config: dict[str, Any], project: str, name: str) -> Any:
        """The W&B run of this folder: the one of an earlier process, continued, or a new one; None without W&B."""
        requested, mode = mode, os.environ.get("WANDB_MODE", mode) if mode == "auto" else mode
        if mode == "disabled":
            return None
        try:
            import wandb
        except ImportError:
            if requested != "auto":
                raise UserError(
                    f'W&B mode "{mode}" needs the wandb package: pip install "mobilemoe-train[tracking]"'
                ) from None
            self.say("tracking: metrics.jsonl only (wandb is not installed)")
            return None
        if mode == "auto":
            mode = "offline"
            with self._surviving("W&B login", "W&B cannot use your login and stays offline"):  # say a malformed key
                wandb.setup(wandb.Settings(silent=True))
                mode = "online" if wandb.login(prompt=False, verify=False) else "offline"
        for attempt in dict.fromkeys((mode, "offline")):  # what cannot be sent now can be sent later
            with self._surviving(f"W&B {attempt}", f"W&B {attempt} does not start"):
                wandb.teardown()  # or the run id of a failed attempt stays taken
                run = wandb.init(
                    dir=str(folder),
                    id=wandb_run_id(folder),
                    resume="allow",
                    mode=attempt,  # type: ignore[arg-type]
                    project=project,
                    name=name,
                    config=config,
                    settings=wandb.Settings(silent=True, console="off", init_timeout=30, finish_timeout=60),
                )
                run.define_metric("*", step_metric="step")  # W&B's own step cannot go back, as a resumed run's does
                local = Path(run.dir).parent
                where = run.url if attempt == "online" else f"offline; to send it later: wandb sync {local}"
                self.say(f"tracking: metrics.jsonl and W&B {where}")
                return run
        return None


def read_metrics(run_dir: str | Path) -> dict[str, list[Record]]:
    """The records of a run folder's metrics.jsonl by kind, the names of the methods of Metrics.

    Of the lines with the same kind, step and source (or title of an alert) the last one wins, because a resumed run
    repeats steps; of EACH_COUNTS all are kept. Records are in order of step; "run" records, one for each process, in
    order of time. A last line cut short by a crash is ignored.

    Raises:
        UserError: there is no such file, or a line other than the last is not a record.
    """
    path = Path(run_dir) / "metrics.jsonl"
    try:
        text = path.read_text(encoding="utf-8")
    except OSError:
        raise UserError(f"{run_dir} is not a run folder: no metrics.jsonl in it") from None
    records: dict[tuple[str, int, str], Record] = {}
    for line_number, line in enumerate(text.split("\n")[:-1], start=1):  # what follows the last newline is torn
        try:
            record = json.loads(line)
            kind, step = record["kind"], record.get("step", line_number)
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"{path}, line {line_number}: not a metrics record: {line[:60]!r}") from None
        which = f"{line_number:12d}" if kind in EACH_COUNTS else record.get("source") or record.get("title") or ""
        records[kind, step, which] = record
    by_kind: dict[str, list[Record]] = {}
    for (kind, _, _), record in sorted(records.items(), key=lambda item: item[0]):
        by_kind.setdefault(kind, []).append(record)
    return by_kind


def drop_torn_line(path: Path, longest_line: int = 1 << 20) -> None:
    """Cut what a killed process left after the last newline of a file: at most `longest_line` bytes."""
    if not path.is_file():
        return
    with open(path, "rb+") as stream:
        start = max(0, stream.seek(0, os.SEEK_END) - longest_line)
        stream.seek(start)
        stream.truncate(start + stream.read().rfind(b"\n") + 1)


def wandb_run_id(folder: Path) -> str:
    """The W&B id of a run folder, made and stored at the first call: a resumed run is the same run on W&B."""
    path = folder / "wandb" / "run_id"
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"{re.sub(r'[^a-z0-9]+', '-', folder.name.lower())}-{os.urandom(5).hex()}\n")
    return path.read_text().strip()


def wandb_entity() -> str:
    """The W&B user that this machine is logged in as. Raises UserError when there is none, or W&B does not answer."""
    try:
        import wandb
    except ImportError:
        raise UserError('this needs the wandb package: pip install "mobilemoe-train[tracking]"') from None
    try:
        wandb.setup(wandb.Settings(silent=True))
        entity = wandb.Api().default_entity if wandb.login(prompt=False, verify=False) else None
    except Exception as error:  # of many kinds: a malformed key, a wrong one, no network
        raise UserError(f"W&B login fails: {first_line(error)}") from None
    if not entity:
        raise UserError("nobody is logged in to W&B here: wandb login, or set WANDB_API_KEY")
    return entity


def plain(value: Any) -> Any:
    """A value as JSON can hold it: arrays and tensors become lists or numbers, NaN and infinities become None."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, dict):
        return {str(name): plain(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if value is None or isinstance(value, str | int | float | bool) else str(value)
