"""What each stage of a chain takes: layout, steps, memory, hours, by mm_train.describe's arithmetic. Torch-free."""

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mm_train import describe
from mm_train.cli import UserError
from mm_train.describe_plan import MFU, read_plan
from mm_train.log_lines import short
from mm_train.recipe_plan import Recipe, Stage
from mm_train.recipe_state import DONE, State, is_exported
from mm_train.report import align
from mm_train.rules import check_world

NOT_HERE = "train.epochs"  # what an error names when a budget in epochs cannot be counted yet


@dataclass(frozen=True)
class Shape:
    """Where a stage runs."""

    nodes: int
    per_node: int  # ranks of a node
    gpus: bool  # a rank is a GPU, not a CPU process

    @property
    def world(self) -> int:
        return self.nodes * self.per_node

    def __str__(self) -> str:
        return f"{self.nodes} x {self.per_node}{'' if self.gpus else ' CPU'}"


@dataclass(frozen=True)
class Estimate:
    """One stage on its nodes."""

    state: State
    shape: Shape
    facts: dict[str, Any] | None  # of mm_train.describe; None: the data set that says how long it is is not there

    @property
    def left(self) -> float:
        """Share of the stage that is still to be done, 0 to 1."""
        state = self.state
        if state.kind == DONE:
            return 0.0
        return 1 - min(1.0, state.step / state.total_steps) if state.total_steps else 1.0

    @property
    def hours(self) -> float | None:
        """Of what is left; None where there is no GPU whose speed could be assumed, or no length."""
        if self.left == 0:
            return 0.0
        return self.facts["days"] * 24 * self.left if self.facts and self.shape.gpus else None

    @property
    def gpu_hours(self) -> float | None:
        return None if self.hours is None else self.hours * self.shape.world

    def notes(self, per_node: int) -> list[str]:
        """What a person should know of the layout before it is queued."""
        cfg, name = self.state.stage.config, self.state.stage.name
        found = []
        ranks = cfg.parallel.expert_parallel * cfg.parallel.tensor_parallel
        if self.left and ranks > per_node:
            found.append(
                f"{name}: expert_parallel x tensor_parallel is {ranks}, more than the {per_node} ranks of a node:"
                " tokens cross the network in every layer"
            )
        if self.left and self.facts and self.shape.gpus and not self.facts["fits"]:
            take = self.facts["recommendation"]
            keys = ("expert_parallel", "tensor_parallel", "zero_stage", "recompute")
            words = " ".join(f"{key}={take[key]}" for key in keys) if take["zero_stage"] is not None else take["why"]
            found.append(
                f"{name}: an estimated {self.facts['memory_gib']['total']:.1f} GiB does not fit into"
                f" {self.facts['gpu']['name']} ({self.facts['gpu']['memory_gib']:g} GiB); describe would take {words}"
            )
        return found


def estimate(states: Sequence[State], shapes: Mapping[str, Shape], gpu: str, mfu: str) -> list[Estimate]:
    """An estimate of each stage. Raises UserError for a layout that the ranks or the batch do not allow."""
    found = []
    for state in states:
        stage, shape = state.stage, shapes[state.stage.name]
        try:
            check_world(stage.config.parallel, shape.world)
            facts = _facts(stage, shape, gpu, mfu)
        except UserError as error:
            if state.kind != DONE:
                raise UserError(f"stage {stage.name} on {shape.world} ranks: {error}{_hint(stage, shape)}") from None
            facts = None
        found.append(Estimate(state, shape, facts))
    return found


def _facts(stage: Stage, shape: Shape, gpu: str, mfu: str) -> dict[str, Any] | None:
    words = argparse.Namespace(
        configs=stage.words, parallel=[f"gpus={shape.world}"], context=None, tokens=None, gpu=gpu, mfu=mfu
    )
    try:
        plan = read_plan(words)
    except UserError as error:
        if stage.config.train.epochs and NOT_HERE in str(error):
            return None
        raise
    return describe.describe(plan)


def _hint(stage: Stage, shape: Shape) -> str:
    """The largest smaller micro-batch into which the batch divides on so many ranks, in words; "" for none."""
    train, rows = stage.config.train, stage.config.data.seq_len * (shape.world // stage.config.parallel.tensor_parallel)
    if not rows or train.global_batch_tokens % (rows * train.micro_batch_size) == 0:  # it is something else
        return ""
    for size in range(train.micro_batch_size - 1, 0, -1):
        if train.global_batch_tokens % (rows * size) == 0:
            return f"; {stage.name}.train.micro_batch_size={size} would do"
    return ""


def table(recipe: Recipe, estimates: Sequence[Estimate]) -> str:
    """A line for each stage and the release."""
    rows = [["step", "nodes x ranks", "layout", "tokens", "steps", "GiB a GPU", "hours", "GPU hours", "state"]]
    for it in estimates:
        stage, layout = it.state.stage, it.facts["layout"] if it.facts else None
        memory = f"{it.facts['memory_gib']['total']:.1f}" if it.facts and it.shape.gpus else "-"
        rows.append(
            [
                stage.name,
                str(it.shape),
                _layout(layout) if layout else "?",
                short(it.state.tokens) or "?",
                it.state.progress,
                memory,
                _number(it.hours),
                _number(it.gpu_hours),
                it.state.kind,
            ]
        )
    if recipe.export:
        kind = DONE if is_exported(recipe.export) and not any(it.left for it in estimates) else "not started"
        rows.append([f"export ({recipe.export.format})", "1", "", "", "", "", "", "", kind])
    return align(rows)


def assumptions(estimates: Sequence[Estimate]) -> str:
    """What the hours and GiB of the table rest on, and their sum."""
    with_gpus = [it for it in estimates if it.shape.gpus]
    if not with_gpus:
        return "no GPUs (MM_GPUS_PER_NODE=0): nothing is said of hours and memory"
    facts = next((it.facts for it in with_gpus if it.facts), None)
    if facts is None:
        return "no estimate: the data sets that say how long the stages are are not there"
    hours = [it.hours for it in with_gpus]
    total = sum(it or 0.0 for it in hours)
    gpu_hours = sum(it.gpu_hours or 0.0 for it in with_gpus)
    known = "" if None not in hours else " at least (a stage's length is not known yet)"
    gpu = facts["gpu"]
    return (
        f"left to do: {_number(total)} hours, {_number(gpu_hours)} GPU hours{known}\n"
        f"assumed, not measured: {gpu['name']} ({gpu['memory_gib']:g} GiB, {gpu['tflops']:g} TFLOP/s) at"
        f" {facts['mfu']:.0%} MFU (--gpu, --mfu); memory is an estimate (python -m mm_train.describe)"
    )


def _layout(layout: dict[str, Any]) -> str:
    tensor = f", TP {layout['tensor_parallel']}" if layout["tensor_parallel"] > 1 else ""
    zero = f", ZeRO {layout['zero_stage']}" if layout["engine"] == "deepspeed" else ""
    again = ", recompute" if layout["recompute"] == "layer" else ""
    rows = f"{layout['micro_batch_size']} rows x {layout['micro_steps']}"
    return f"EP {layout['expert_parallel']}{tensor}{zero}{again}, {rows}"


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


DEFAULT_MFU = str(MFU)
