"""How far a recipe has come: what its run folders say of each stage. Torch-free.

Nothing is written and nobody is disturbed: this may be asked while the stages run, here or on another machine.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mm_train import budget, config
from mm_train.cli import UserError
from mm_train.config import Config
from mm_train.log_lines import number, short
from mm_train.recipe_plan import DEVICE_FILES, Export, Recipe, Stage
from mm_train.run_folder import read_stage
from mm_train.watchdog import HEARTBEAT_SECONDS, LEFT, read_heartbeat

DONE, RUNNING, STOPPED, WAITING = "done", "running", "stopped", "not started"
SILENT_SECONDS = 12 * HEARTBEAT_SECONDS  # a run without a heartbeat for so long is not running
# What changes nothing that is learned: a finished stage may have other values.
FREE = {"parallel", "checkpoint", "evaluate", "faults", "profile", "log", "run", "init_from", "resume_from"}
FREE |= {f"data.{key}" for key in ("path", "validation", "workers", "ahead", "verify", "max_epochs", "on_change")}
FREE |= {"data.cache_dir", "data.cache_gib", "train.validate_every", "train.validation_tokens", "train.recompute"}
FREE |= {"model.name"}


@dataclass(frozen=True)
class State:
    """One stage as it stands."""

    stage: Stage
    kind: str  # done | running | stopped | not started
    step: int  # steps done
    total_steps: int | None  # None: in epochs of a data set that is not here
    tokens: int | None  # of the whole stage
    loss: float | None  # of the last log line
    trouble: str | None = None  # why what is there cannot be gone on from as it is

    @property
    def progress(self) -> str:
        """Steps done of all."""
        return f"{self.step}/{'?' if self.total_steps is None else self.total_steps}"


def states(recipe: Recipe) -> list[State]:
    """Every stage, in order. Raises UserError for a run folder whose record cannot be read."""
    found: list[State] = []
    for stage in recipe.stages:
        state = _state(stage)
        if state.kind != WAITING and found and found[-1].kind != DONE:
            text = f"{stage.name} was begun, but {found[-1].stage.name} before it is {found[-1].kind}"
            state = replace(state, trouble=state.trouble or text)
        found.append(state)
    return found


def refusal(recipe: Recipe, stage: Stage) -> str | None:
    """Why a stage cannot be started now; None when it can."""
    place = recipe.stages.index(stage)
    if place == 0:
        return None
    before = _state(recipe.stages[place - 1])
    if before.kind == DONE:
        return None
    return (
        f"stage {stage.name} starts from {before.stage.run_dir}, which is not finished ({before.kind},"
        f" {before.progress} steps): train {before.stage.name} first"
    )


def is_exported(export: Export) -> bool:
    """Is the release there, and made after the last stage was done?"""
    done, made = export.run_dir / "DONE", export.out / DEVICE_FILES.get(export.format, "config.json")
    return made.exists() and done.exists() and made.stat().st_mtime >= done.stat().st_mtime


def rows(recipe: Recipe, found: list[State]) -> list[list[str]]:
    """A heading and a line for each stage, and one for the release."""
    table = [["stage", "tokens", "steps", "last loss", "state", "run folder"]]
    for state in found:
        cells = [short(state.tokens) or "?", state.progress, number(state.loss, ".3f") or "", state.kind]
        table.append([state.stage.name, *cells, str(state.stage.run_dir)])
    if recipe.export:
        kind = DONE if is_exported(recipe.export) else WAITING
        table.append([f"export ({recipe.export.format})", "", "", "", kind, str(recipe.export.out)])
    return table


def differences(recorded: Config, wanted: Config) -> Iterator[str]:
    """Keys, with both values, in which a run was trained otherwise than is wanted now, as far as it matters."""
    here, there = _flat(asdict(wanted)), _flat(asdict(recorded))
    for key in sorted(here.keys() | there.keys()):
        if here.get(key) != there.get(key) and not any(key == free or key.startswith(f"{free}.") for free in FREE):
            yield f"{key} {there.get(key)} (now {here.get(key)})"


def _state(stage: Stage) -> State:
    folder = stage.run_dir
    trouble = None
    try:
        wanted = budget.from_folder(stage.config)
        total, tokens = wanted.total_steps, wanted.total_steps * wanted.train.global_batch_tokens
    except UserError:  # the data set is not here
        wanted, total, tokens = stage.config, None, None
    done = (folder / "DONE").is_file()
    if not (folder / "metrics.jsonl").is_file():
        return State(stage, DONE if done else WAITING, total or 0 if done else 0, total, tokens, None)
    run = read_stage(folder)
    losses = run.series("loss")[1]
    kind = DONE if done else RUNNING if _beats(folder) else STOPPED
    recorded = _recorded(folder)
    if recorded is not None:
        if total is None:
            wanted = replace(wanted, train=replace(wanted.train, tokens=recorded.train.tokens, epochs=0.0))
            total, tokens = recorded.total_steps, recorded.train.tokens
        if changes := list(differences(recorded, wanted)):
            what = "finished" if done else "begun"
            trouble = f"{stage.name} was {what} with another configuration: {', '.join(changes)}"
    step = _steps(folder) if done else run.steps
    return State(stage, kind, step or run.steps, total, tokens, losses[-1] if losses else None, trouble)


def _recorded(folder: Path) -> Config | None:
    """The configuration that a run was trained with; None when it cannot be read."""
    try:
        return config.load([folder / "config.yaml"], check=lambda _: None)
    except UserError:
        return None


def _steps(folder: Path) -> int | None:
    try:
        return int(json.loads((folder / "DONE").read_text())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _beats(folder: Path) -> bool:
    """Does somebody train there, by rank 0's last sign of life?"""
    beat = read_heartbeat(folder, 0)
    return beat is not None and beat["phase"] != LEFT and time.time() - beat["time"] < SILENT_SECONDS


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted keys; a mixture as shares, so that equal ones are equal however they are written."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if key == "mixture":
            total = sum(value.values()) or 1.0
            flat[prefix + key] = {name: round(weight / total, 6) for name, weight in sorted(value.items()) if weight}
        elif isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
