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

from mm_train.cli import UserError
from mm_train.log_lines import Record, clock, load_factors, run_line, train_line, validation_line

WANDB_MODES = ("auto", "online", "offline", "disabled")

# The first part of a name is its panel group on W&B; what is not listed is shown under "train".
WANDB_GROUPS = {
    "z_loss": "router",
    "dropped_fraction": "router",
    "tokens_per_second": "throughput",
    "mfu": "throughput",
    "seconds": "throughput",
    "data_seconds": "throughput",
    "memory_gib": "throughput",
}


class Metrics:
    """The log of one run of one stage. Every method is a no-op on ranks other than the main one.

    Once the run folder is open, no failure to record (a full disk, W&B gone) raises: it is said once on stderr and
    training goes on.

    Args:
        run_dir: the run folder; made if it is missing. Lines are appended, so that a resumed run continues its record.
        is_main: whether this rank writes.
        wandb_mode: "online", "offline", "disabled", or "auto": what WANDB_MODE says, else online for a user who is
            logged in to W&B and offline for others.
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
        self._wandb: Any = None
        if not is_main:
            return
        if wandb_mode not in WANDB_MODES:
            raise UserError(f'unknown W&B mode "{wandb_mode}": it is one of {", ".join(WANDB_MODES)}')
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

        Known to the log line, W&B and the report: tokens (so far), loss (nats per token), lr, grad_norm, z_loss,
        tokens_per_second, seconds (since the process started), data_seconds, mfu, memory_gib, dropped_fraction, and
        expert_load: for each layer the share of the routed tokens that each expert got. None: not measured.
        """
        if values.get("expert_load") is not None:  # five decimals are plenty, and half the file
            values["expert_load"] = np.asarray(values["expert_load"], dtype=float).round(5).tolist()
        record = {"kind": "train", "step": step, **values}
        if self._record(record):
            self.say(train_line(record, self._facts))
            self._track(step, wandb_train_values(values))

    def validation(self, step: int, source: str, **values: Any) -> None:
        """Record the held-out loss (nats per token) and bits per byte of one source."""
        record = {"kind": "validation", "step": step, "source": source, **values}
        if self._record(record):
            self.say(validation_line(record, self._facts))
            self._track(step, {f"validation/{source}/{name}": value for name, value in values.items()})

    def checkpoint(self, step: int, **values: Any) -> None:
        """Record a finished checkpoint: seconds it took, bytes on disk."""
        record = {"kind": "checkpoint", "step": step, **values}
        if self._record(record):
            self._track(step, {f"checkpoint/{name}": value for name, value in values.items()})

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

    def _track(self, step: int, values: dict[str, Any]) -> None:
        if self._wandb is not None:
            with self._surviving("W&B"):
                shown = {name: value for name, value in plain(values).items() if value is not None}
                self._wandb.log({"step": step, **shown})

    @contextmanager
    def _surviving(self, what: str, complaint: str = "") -> Iterator[None]:
        """Run the block; a failure of `what` is said once and goes no further."""
        try:
            yield
        except Exception as error:  # W&B raises errors of many kinds, and none of them may end a training run
            if what not in self._said:
                self._said.add(what)
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                complaint = complaint or f"{what} fails, training goes on"
                print(f"warning: {complaint}: {reason}", file=sys.stderr, flush=True)

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
    """The records of a run folder's metrics.jsonl by kind ("run", "train", "validation", "checkpoint", "done").

    Of the lines with the same kind, step and source, the last one wins: a resumed run repeats steps. Records are in
    order of step; "run" records, one for each process, in order of time. A last line cut short by a crash is ignored.

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
        records[kind, step, record.get("source", "")] = record
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


def wandb_train_values(values: Record) -> Record:
    """The values of a training record under their W&B names: train/loss, throughput/..., router/load_max/layer_00."""
    named = {f"{WANDB_GROUPS.get(name, 'train')}/{name}": v for name, v in values.items() if name != "expert_load"}
    for layer, factor in enumerate(load_factors(values.get("expert_load"))):
        named[f"router/load_max/layer_{layer:02d}"] = factor
    return named


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
