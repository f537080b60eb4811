"""Which optimizer moves each part of a network, which parts decay, and what training keeps for each tensor. Torch-free.

Weight decay is for matrices: a norm's weight has no scale to be kept small, so `optim.no_decay` names the norms unless
a config says otherwise. Muon (optim.name=muon) moves the matrices between the residual stream and a hidden layer; the
embedding, which is the head too, the router and the norms stay with AdamW.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from mm_train import inventory
from mm_train.config import Model, Optim
from mm_train.inventory import KINDS

MUON_PARTS = ("attention", "routed experts", "shared expert", "mlp")


@dataclass(frozen=True)
class Group:
    """Parameters that are treated alike. `name` tells the groups of a run apart."""

    algorithm: str  # adamw | muon
    weight_decay: float

    @property
    def name(self) -> str:
        return f"{self.algorithm}, weight decay {self.weight_decay:g}"


def group_of(part: str, optim: Optim) -> Group:
    """The group of a part of the network."""
    algorithm = "muon" if optim.name == "muon" and part in MUON_PARTS else "adamw"
    return Group(algorithm, 0.0 if part in optim.no_decay else optim.weight_decay)


def kinds_of(entry: inventory.Entry, optim: Optim) -> tuple[str, ...]:
    """What training keeps of a tensor (KINDS): a buffer has no moments, a matrix that Muon moves has its momentum."""
    if inventory.is_buffer(entry.name):
        return KINDS[:1]
    return KINDS[:2] if group_of(entry.part, optim).algorithm == "muon" else KINDS


def table(model: Model, optim: Optim) -> list[dict[str, Any]]:
    """The groups that a network has, those of most parameters first, with the parts and the number of parameters."""
    rows: dict[Group, dict[str, Any]] = {}
    for entry in inventory.tensors(model):
        if not inventory.is_buffer(entry.name):
            group = group_of(entry.part, optim)
            row = rows.setdefault(group, asdict(group) | {"parts": [], "parameters": 0})
            row["parameters"] += entry.size
            if entry.part not in row["parts"]:
                row["parts"].append(entry.part)
    return sorted(rows.values(), key=lambda row: -row["parameters"])


def lines(rows: list[dict[str, Any]]) -> Iterator[str]:
    """`table` for people."""
    names = {"adamw": "AdamW", "muon": "Muon"}
    for row in rows:
        decay = f"weight decay {row['weight_decay']:g}" if row["weight_decay"] else "no weight decay"
        yield f"{names[row['algorithm']]}, {decay}: {', '.join(row['parts'])} ({row['parameters']:,} parameters)"
