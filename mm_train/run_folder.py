"""Reads the run folders that training leaves behind: one Stage each. Torch-free."""

import fnmatch
import statistics
from dataclasses import dataclass
from pathlib import Path

from mm_train.cli import UserError
from mm_train.log_lines import Record
from mm_train.metric_names import NAMES, named
from mm_train.metrics import read_metrics

Series = tuple[list[float], list[float]]  # tokens so far, values


@dataclass(frozen=True)
class Event:
    """Something that a person may want to know of, after `step`."""

    step: int
    kind: str  # resumed | skipped | rollback | alert | stopped
    text: str


@dataclass
class Stage:
    """One stage's run folder."""

    name: str
    started: str  # ISO time of the first process
    facts: Record  # the latest "run" record
    train: list[Record]  # in order of step
    validation: dict[str, list[Record]]  # by source, in order of step
    checkpoints: list[Record]  # in order of step
    events: list[Event]  # in order of step
    named: dict[str, Series]  # every recorded number under its name in metric_names
    finished: bool
    config: str  # resolved configuration, YAML

    @property
    def steps(self) -> int:
        """Optimizer steps done."""
        return self.train[-1]["step"] if self.train else 0

    @property
    def tokens(self) -> int:
        """Tokens trained on in this stage."""
        return self.train[-1].get("tokens") or 0 if self.train else 0

    @property
    def tokens_per_second(self) -> float | None:
        """Median over the stage: the first interval includes warming up."""
        speeds = self.series("tokens_per_second")[1]
        return statistics.median(speeds) if speeds else None

    @property
    def expert_load(self) -> list[list[float]]:
        """The latest load: for each layer, how many times the mean each expert gets."""
        loads = [record["expert_load"] for record in self.train if record.get("expert_load")]
        layers = [[share or 0.0 for share in layer] for layer in loads[-1]] if loads else []
        return [[share * len(layer) / (sum(layer) or 1.0) for share in layer] for layer in layers]

    def series(self, name: str) -> Series:
        """A recorded training value over the stage, without the gaps."""
        points = [(r["tokens"], r[name]) for r in self.train if r.get("tokens") and r.get(name) is not None]
        return [x for x, _ in points], [y for _, y in points]

    def matching(self, patterns: tuple[str, ...]) -> dict[str, Series]:
        """The series whose names fit one of the patterns ("*" stands for anything), pattern by pattern."""
        names = [name for pattern in patterns for name in fnmatch.filter(self.named, pattern)]
        return {name: self.named[name] for name in names}

    def tokens_after(self, step: int) -> float:
        """Tokens that the stage has trained on after `step`."""
        return step * (self.facts.get("global_batch_tokens") or 1)

    def held_out(self, source: str, name: str) -> Series:
        """A held-out value of one source over the stage ("loss", "bits_per_byte")."""
        records = [r for r in self.validation.get(source, []) if r.get(name) is not None]
        points = [(self.tokens_after(r["step"]), r[name]) for r in records]
        return [x for x, _ in points], [y for _, y in points]

    def last_held_out(self, source: str, name: str) -> float | None:
        """The latest held-out value of a source; None when it was never measured."""
        values = self.held_out(source, name)[1]
        return values[-1] if values else None


def read_stages(folder: Path) -> list[Stage]:
    """The run in a folder, or those in the folders directly below it, in order of their start.

    Raises:
        UserError: there is no run, or a metrics.jsonl that cannot be read.
    """
    if not folder.is_dir():
        raise UserError(f"no such folder: {folder}")
    found = (
        [folder] if (folder / "metrics.jsonl").exists() else [path.parent for path in folder.glob("*/metrics.jsonl")]
    )
    if not found:
        raise UserError(f"no metrics.jsonl in {folder} or in a folder directly below it: nothing was trained there yet")
    return sorted((read_stage(path) for path in found), key=lambda stage: stage.started)


def read_stage(folder: Path) -> Stage:
    """Read one run folder."""
    records = read_metrics(folder)
    runs = records.get("run", [])
    facts = runs[-1] if runs else {}
    validation: dict[str, list[Record]] = {}
    for record in records.get("validation", []):
        validation.setdefault(record["source"], []).append(record)
    batch = facts.get("global_batch_tokens") or 1
    config = folder / "config.yaml"
    return Stage(
        name=facts.get("stage") or folder.name,
        started=runs[0].get("time", "") if runs else "",
        facts=facts,
        train=records.get("train", []),
        validation=validation,
        checkpoints=records.get("checkpoint", []),
        events=read_events(records),
        named=read_named(records, batch),
        finished=(folder / "DONE").exists(),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )


def read_events(records: dict[str, list[Record]]) -> list[Event]:
    """Resumes, skipped steps, rollbacks, alerts and stops, in order of step."""
    events = [
        Event(run["first_step"], "resumed", f"a new process went on after step {run['first_step']}")
        for run in records.get("run", [])
        if run.get("first_step")
    ]
    for kind in ("skipped", "rollback", "alert", "stopped"):
        for record in records.get(kind, []):
            text = f"{record['title']}: {record['text']}" if kind == "alert" else record["reason"]
            if kind == "rollback":
                text = f"back to step {record['to_step']}: {text}"
            events.append(Event(record["step"], kind, text))
    return sorted(events, key=lambda event: (event.step, event.kind == "resumed"))  # what was before went before


def read_named(records: dict[str, list[Record]], batch: int) -> dict[str, Series]:
    """Every number of the records as a series, in order of step; `batch`: tokens of a step."""
    points: dict[str, dict[float, float]] = {}
    for kind in NAMES:
        for record in records.get(kind, []):
            tokens = record.get("tokens") if kind == "train" else None
            for name, value in named(record).items():
                if value is not None:
                    points.setdefault(name, {})[tokens or record["step"] * batch] = value
    return {name: (sorted(found), [found[x] for x in sorted(found)]) for name, found in points.items()}
