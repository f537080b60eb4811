"""How far the prepared text goes: what a stage reads of each source against what there is.

Torch-free, and numpy is imported only where an order is asked for: mm_train.describe has to be quick.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_train.manifest import NAME, read_manifest

if TYPE_CHECKING:
    from mm_train.order import Mixture


@dataclass(frozen=True)
class SourcePlan:
    """One source over a whole stage. Tokens are those of full rows."""

    name: str
    share: float  # of the rows
    available: int  # tokens
    tokens: int  # read in the stage
    epochs: float  # how often the source is read, on average over its rows


def plan(mixture: "Mixture", seq_len: int, samples: int) -> list[SourcePlan]:
    """What a run of `samples` samples reads of each source of its mixture."""
    epochs, block = mixture.epochs(samples), sum(mixture.quotas.values())
    return [
        SourcePlan(name, quota / block, windows * seq_len, round(epochs[name] * windows) * seq_len, epochs[name])
        for name, quota in mixture.quotas.items()
        for windows in [mixture.num_windows[name]]
    ]


def plan_folder(
    path: Path, weights: Mapping[str, float], seq_len: int, samples: int
) -> tuple[list[SourcePlan], list[str]]:
    """The plan from what is in a data set folder, and which sources are not. Raises UserError for damaged manifests."""
    from mm_train.order import Mixture

    folders = {name: path / name / "train" for name, weight in weights.items() if weight}
    there = {name: read_manifest(folder) for name, folder in folders.items() if (folder / NAME).is_file()}
    windows = dict.fromkeys(weights, 1) | {name: max(1, found.num_windows(seq_len)) for name, found in there.items()}
    sources = plan(Mixture(weights, windows, seed=0), seq_len, samples)
    return [s for s in sources if s.name in there], [name for name in folders if name not in there]


def lines(sources: Iterable[SourcePlan]) -> list[str]:
    """A line for each source."""
    return [
        f"data {s.name}: {s.share:.1%} of the rows, {_count(s.tokens)} tokens of {_count(s.available)}:"
        f" {s.epochs:.3g} epochs"
        for s in sources
    ]


def too_often(sources: Iterable[SourcePlan], max_epochs: float) -> str | None:
    """What to say when sources are repeated more often than `max_epochs`; None when none is."""
    found = [f"{s.name} {s.epochs:.1f} times" for s in sources if s.epochs > max_epochs]
    if not found:
        return None
    return (
        f"this stage reads {', '.join(found)}; more than data.max_epochs ({max_epochs:g}): prepare more text, lower the"
        " weight in data.mixture, or raise the limit"
    )


def _count(tokens: int) -> str:
    units: Mapping[str, int] = {"T": 10**12, "B": 10**9, "M": 10**6, "k": 10**3}
    for unit, size in units.items():
        if tokens >= size:
            return f"{tokens / size:.3g} {unit}"
    return str(tokens)
