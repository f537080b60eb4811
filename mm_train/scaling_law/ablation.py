"""What each choice of a sweep is worth: held-out losses beside a reference, seed by seed, as text and as a figure.

Runs of one seed see the same data in the same order, so that differences are taken within seeds: their spread is that
of the choice, not that of the seeds. Torch-free.
"""

import argparse
import csv
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_train.cli import UserError
from mm_train.files import write_atomic, writing

Cell = tuple[int, int, bool, str]  # expansion, granularity, shared, variant
NEEDED = ("name", "active_params", "total_params", "tokens", "expansion", "granularity", "shared", "seed", "loss")


@dataclass(frozen=True)
class Setting:
    """All seeds of one network."""

    cell: Cell
    active: int
    total: int
    tokens: int
    losses: dict[int, float]  # by seed, nats a token

    @property
    def mean(self) -> float:
        return statistics.mean(self.losses.values())

    @property
    def label(self) -> str:
        expansion, granularity, shared, variant = self.cell
        kind = "dense" if expansion == 1 else f"E={expansion} g={granularity}{' shared' if shared else ''}"
        return f"{kind}, {variant}" if variant else kind


@dataclass(frozen=True)
class Difference:
    """A setting against another, seed by seed: nats a token, positive where it is worse."""

    by_seed: tuple[float, ...]

    @property
    def mean(self) -> float:
        return statistics.mean(self.by_seed)

    @property
    def error(self) -> float:
        """Standard error of the mean."""
        return statistics.stdev(self.by_seed) / math.sqrt(len(self.by_seed)) if len(self.by_seed) > 1 else math.inf

    @property
    def verdict(self) -> str:
        """Whether the seeds agree, and by more than twice the error."""
        one_sign = all(x > 0 for x in self.by_seed) or all(x < 0 for x in self.by_seed)
        if not one_sign or abs(self.mean) <= 2 * self.error:
            return "within the noise"
        return "worse" if self.mean > 0 else "better"


def add_command(commands: "argparse._SubParsersAction") -> None:
    """The subcommand `ablation`."""
    parser = commands.add_parser("ablation", help="compare the runs of a sweep with one of them")
    parser.description = "Table and figure of what each choice of a sweep is worth."
    parser.add_argument("runs", type=Path, help="runs.csv of a sweep of one shape and one budget")
    parser.add_argument("--reference", default="8,8,1", help="expansion,granularity,shared (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="path without ending: writes OUT.md and OUT.svg")
    parser.set_defaults(func=main)


def main(args: argparse.Namespace) -> int:
    """Run the subcommand."""
    settings = read(args.runs)
    reference = find(settings, args.reference)
    text = table(settings, reference)
    with writing(args.out.parent):
        args.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out.with_suffix(".md"), text.encode())
    from mm_train.scaling_law.ablation_figure import draw

    with writing(args.out.parent):
        write_atomic(args.out.with_suffix(".svg"), draw(settings, reference))
    print(text)
    print(f"{args.out.with_suffix('.md')}, {args.out.with_suffix('.svg')}")
    return 0


def read(path: Path) -> list[Setting]:
    """The settings of a CSV, in its order.

    Raises UserError where a column or a number is missing, or where budgets or shapes differ.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    if not rows:
        raise UserError(f"{path} holds no runs")
    if missing := [column for column in NEEDED if column not in rows[0]]:
        raise UserError(f"{path} has no column {missing[0]}; a sweep writes {', '.join(NEEDED)}")
    found: dict[Cell, Setting] = {}
    for number, row in enumerate(rows, start=2):
        try:
            cell = (int(row["expansion"]), int(row["granularity"]), row["shared"] == "1", row.get("variant") or "")
            facts = (int(row["active_params"]), int(row["total_params"]), int(row["tokens"]))
            seed, loss = int(row["seed"]), float(row["loss"])
        except (TypeError, ValueError) as error:
            raise UserError(f"{path}, line {number}: {error}") from None
        setting = found.setdefault(cell, Setting(cell, *facts, {}))
        if (setting.active, setting.total, setting.tokens) != facts or seed in setting.losses:
            raise UserError(
                f"{path}, line {number}: {row['name']} is a second size or budget of {setting.label}; an ablation has"
                " one of each: split the file"
            )
        setting.losses[seed] = loss
    return list(found.values())


def find(settings: Sequence[Setting], words: str) -> Setting:
    """The setting that `words` (expansion,granularity,shared) name. Raises UserError."""
    try:
        expansion, granularity, shared = (int(word) for word in words.split(","))
    except ValueError:
        raise UserError(f"--reference {words!r} must be expansion,granularity,shared, as in 8,8,1") from None
    for setting in settings:
        if setting.cell == (expansion, granularity, bool(shared), ""):
            return setting
    names = "; ".join(setting.label for setting in settings)
    raise UserError(f"no run has expansion {expansion}, granularity {granularity}, shared {shared}; there are: {names}")


def difference(setting: Setting, other: Setting) -> Difference:
    """`setting` minus `other` for the seeds that both have. Raises UserError where there is none."""
    seeds = sorted(setting.losses.keys() & other.losses.keys())
    if not seeds:
        raise UserError(f"{setting.label} and {other.label} have no seed in common")
    return Difference(tuple(setting.losses[seed] - other.losses[seed] for seed in seeds))


def table(settings: Sequence[Setting], reference: Setting) -> str:
    """Markdown: one row a setting."""
    head = f"Held-out loss in nats a token after {reference.tokens:,} tokens; differences to {reference.label}.\n\n"
    lines = ["| network | active | total | loss, by seed | mean | difference | |", "|---|---|---|---|---|---|---|"]
    for setting in settings:
        losses = " ".join(f"{loss:.4f}" for _, loss in sorted(setting.losses.items()))
        gap, verdict = "", "reference"
        if setting is not reference:
            against = difference(setting, reference)
            gap, verdict = f"{against.mean:+.4f} ± {against.error:.4f}", against.verdict
        facts = f"{setting.label} | {setting.active:,} | {setting.total:,} | {losses} | {setting.mean:.4f}"
        lines.append(f"| {facts} | {gap} | {verdict} |")
    return head + "\n".join(lines) + "\n"
