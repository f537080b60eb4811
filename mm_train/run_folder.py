"""Reads the run folders that training leaves behind: one Stage each. Torch-free."""

import statistics
from dataclasses import dataclass
from pathlib import Path

from mm_train.cli import UserError
from mm_train.log_lines import Record
from mm_train.metrics import read_metrics

Series = tuple[list[float], list[float]]  # tokens so far, values


@dataclass
class Stage:
    """One stage's run folder."""

    name: str
    started: str  # ISO time of the first process
    facts: Record  # the latest "run" record
    train: list[Record]  # in order of step
    validation: dict[str, list[Record]]  # by source, in order of step
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

    def held_out(self, source: str, name: str) -> Series:
        """A held-out value of one source over the stage ("loss", "bits_per_byte")."""
        batch = self.facts.get("global_batch_tokens") or 1
        points = [(r["step"] * batch, r[name]) for r in self.validation.get(source, []) if r.get(name) is not None]
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
    config = folder / "config.yaml"
    return Stage(
        name=facts.get("stage") or folder.name,
        started=runs[0].get("time", "") if runs else "",
        facts=facts,
        train=records.get("train", []),
        validation=validation,
        finished=(folder / "DONE").exists(),
        config=config.read_text(encoding="utf-8") if config.exists() else "",
    )
