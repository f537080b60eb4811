"""runs.csv: one line for each trained network, and what its held-out loss was. Torch-free.

Columns: name, active_params, total_params, tokens, expansion, granularity, shared, seed, loss; others are ignored.
"""

import csv
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mm_train.cli import UserError
from mm_train.scaling_law.law import Array

COLUMNS = {  # name -> is a whole number
    "active_params": True,
    "total_params": True,
    "tokens": True,
    "expansion": False,
    "granularity": True,
    "shared": True,
    "seed": True,
    "loss": False,
}


@dataclass(frozen=True)
class Runs:
    """The columns as arrays [runs]. Granularity and shared expert mean nothing of a dense network (expansion 1)."""

    active_params: Array
    total_params: Array
    tokens: Array
    expansion: Array
    granularity: Array
    shared: Array
    seed: Array
    loss: Array

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: npt.NDArray[np.bool_]) -> "Runs":
        """The runs that the mask `keep` [runs] chooses."""
        return Runs(**{name: getattr(self, name)[keep] for name in COLUMNS})

    @property
    def sparse(self) -> "Runs":
        """Without the dense ones."""
        return self.where(self.expansion > 1)

    def values(self, column: str) -> list[float]:
        """Distinct values of a column, sorted."""
        return [float(value) for value in np.unique(getattr(self, column))]


def read_runs(path: Path) -> Runs:
    """Read a table of runs. Raises UserError that names line, column and value of what cannot be."""
    try:
        with path.open(newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = [name for name in COLUMNS if name not in (reader.fieldnames or [])]
            if missing:
                found = ", ".join(map(str, reader.fieldnames or [])) or "none"
                raise UserError(
                    f"{path} lacks the column{'s'[: len(missing) > 1]} {', '.join(missing)}; it has {found}"
                )
            rows = [_row(line, f"{path}, line {reader.line_num}") for line in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"cannot read the runs {path}: {error}") from None
    if not rows:
        raise UserError(f"{path} has no runs, only a header")
    return Runs(**{name: np.array([row[name] for row in rows]) for name in COLUMNS})


def to_csv(rows: Iterable[dict[str, object]]) -> str:
    """The text of a table that `read_runs` reads."""
    lines = [",".join(("name", *COLUMNS))]
    lines += [",".join(str(row[name]) for name in ("name", *COLUMNS)) for row in rows]
    return "\n".join(lines) + "\n"


def _row(line: dict[str, str | None], place: str) -> dict[str, float]:
    row = {}
    for name, whole in COLUMNS.items():
        text = line[name]
        try:
            value = float(text or "")
        except ValueError:
            raise UserError(f"{place}: {name} is {text!r:.60}; it must be a number") from None
        if not math.isfinite(value):
            hint = ": leave a run that failed out of the table" if name == "loss" else ""
            raise UserError(f"{place}: {name} is {text}, not finite{hint}")
        if whole and value != int(value):
            raise UserError(f"{place}: {name} is {text}; it must be a whole number")
        row[name] = value
    for name in ("active_params", "total_params", "tokens", "granularity", "loss"):
        if row[name] <= 0:
            raise UserError(f"{place}: {name} is {line[name]}; it must be above 0")
    if row["expansion"] < 1:
        raise UserError(f"{place}: expansion is {line['expansion']}; it is 1 for a dense network, and above for others")
    if row["shared"] not in (0, 1):
        raise UserError(f"{place}: shared is {line['shared']}; it must be 0 or 1")
    if row["active_params"] > row["total_params"]:
        raise UserError(
            f"{place}: active_params ({line['active_params']}) exceeds total_params ({line['total_params']})"
        )
    return row
