"""The budget problem: the least loss over networks and tokens, under memory, training FLOPs and limits. Torch-free.

    min L(N, D, E)   with   6 N D <= training FLOPs,   int4 file + int8 cache <= memory,   N <= active parameters

The networks are those of shapes.py, each counted exactly; tokens follow from the FLOPs. N, like in the paper's S, M and
L, counts all that takes part in a token's forward pass, the tied embedding once.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from mm_train import costs
from mm_train.cli import UserError
from mm_train.config import Model
from mm_train.release_format import file_bytes
from mm_train.scaling_law.law import Law
from mm_train.scaling_law.shapes import VOCABULARY, Candidate, candidates

SLACK = 0.15  # so far beyond the fitted sizes is still inside: the paper's 0.3 B stands for networks like S with 0.272

GIB = 2**30


@dataclass(frozen=True)
class Budget:
    """What a network may cost."""

    train_flops: float
    memory: float  # bytes, of weights and cache
    context: int = 8192  # tokens in the cache
    active_max: float = math.inf
    tokens_min: float = 0.0
    tokens_max: float = math.inf


@dataclass(frozen=True)
class Option:
    """A network within the budget, and how long to train it."""

    expansion: int
    model: Model
    active: int
    total: int
    int4_bytes: int  # of the file
    cache_bytes: int
    tokens: int
    loss: float

    @property
    def memory(self) -> int:
        """Bytes on the device."""
        return self.int4_bytes + self.cache_bytes


class Row(NamedTuple):
    """An expansion: the best network of it, what it costs against the best of all, and at worst within the fit."""

    option: Option
    regret: float  # here
    worst: float  # the most anywhere in the fitted range of N and D
    chance: float | None  # share of the bootstrap's laws by which it is the best here


class Place(NamedTuple):
    """A point where the law is asked, and its regret of every expansion there."""

    active: float
    tokens: float
    regrets: dict[int, float]


def options(law: Law, budget: Budget, expansions: Sequence[int], vocabulary: int = VOCABULARY) -> list[Option]:
    """The network of least loss for each expansion that has one. Raises UserError when none has."""
    found = []
    reasons: list[str] = []
    for expansion in expansions:
        best = _best(law, budget, expansion, vocabulary, reasons)
        if best is not None:
            found.append(best)
    if not found:
        raise UserError(f"no network fits the budget: {reasons[0]}")
    return found


def _best(law: Law, budget: Budget, expansion: int, vocabulary: int, reasons: list[str]) -> Option | None:
    sized = sorted(_sized(law, budget, expansion, vocabulary), key=lambda item: item[0])
    for loss, tokens, (model, active, total) in sized:
        if total / 2 > budget.memory:  # the codes alone: no need to lay out the file
            continue
        cache = budget.context * costs.kv_bytes_per_token(model, 1)
        option = Option(expansion, model, active, total, file_bytes(model, "int4"), cache, tokens, loss)
        if option.memory <= budget.memory:
            return option
    model, active, _ = next(candidates(expansion, law.granularity, law.shared, vocabulary))
    memory = file_bytes(model, "int4") + budget.context * costs.kv_bytes_per_token(model, 1)
    reasons.append(
        f"the smallest by the shape rules with E = {expansion} has {active:,} active parameters, for which the FLOPs"
        f" buy {budget.train_flops / (6 * active):.3g} tokens, and takes {memory / GIB:.3g} GiB with a cache of"
        f" {budget.context:,} tokens"
    )
    return None


def _sized(law: Law, budget: Budget, expansion: int, vocabulary: int) -> Iterator[tuple[float, int, Candidate]]:
    """(loss, tokens, network) of the candidates that keep to all but the memory."""
    for candidate in candidates(expansion, law.granularity, law.shared, vocabulary):
        tokens = int(min(budget.train_flops / (6 * candidate.active), budget.tokens_max))
        if candidate.active <= budget.active_max and tokens >= max(budget.tokens_min, 1):
            yield float(law.loss(candidate.active, tokens, expansion)), tokens, candidate


def compare(law: Law, found: Sequence[Option]) -> list[Row]:
    """Regret of every option here, and of its expansion in the whole range of the fit."""
    least = min(option.loss for option in found)
    worst = worst_regrets(law, [option.expansion for option in found])
    draws = np.array([law.loss_draws(o.active, o.tokens, o.expansion) for o in found])  # [options, draws]
    wins = [None] * len(found) if draws.shape[1] == 0 else [
        float(np.mean(draws.argmin(0) == index)) for index in range(len(found))
    ]  # fmt: skip
    return [Row(o, o.loss - least, worst[o.expansion], win) for o, win in zip(found, wins, strict=True)]


def recommend(rows: Sequence[Row], tolerance: float) -> Row:
    """Of the expansions within `tolerance` of the best here, the one that loses least where it does worst.

    Losses that differ by less than the law's own error do not rank networks; how an expansion does over all sizes and
    budgets of the fit does.
    """
    near = [row for row in rows if row.regret <= tolerance]
    return min(near, key=lambda row: row.worst)


def worst_regrets(law: Law, expansions: Sequence[int]) -> dict[int, float]:
    """The most that each expansion is behind the best of them, over the fitted range of N and D."""
    active = np.geomspace(*law.active_params, 25)[:, None]
    tokens = np.geomspace(*law.tokens, 25)
    losses = np.array([law.loss(active, tokens, expansion) for expansion in expansions])
    behind = (losses - losses.min(0)).max((1, 2))
    return dict(zip(expansions, map(float, behind), strict=True))


def place(law: Law, active: float, tokens: float, expansions: Sequence[int]) -> Place:
    """The regrets of expansions at equal N and D."""
    losses = {expansion: float(law.loss(active, tokens, expansion)) for expansion in expansions}
    least = min(losses.values())
    return Place(active, tokens, {expansion: loss - least for expansion, loss in losses.items()})


def outside(law: Law, option: Option) -> str | None:
    """In what the option leaves the range of the fit, in words; None when it stays inside.

    Tokens have no slack: it is in D that the published law turns.
    """
    said = []
    for word, value, (low, high), slack in (
        ("N", option.active, law.active_params, SLACK),
        ("D", option.tokens, law.tokens, 0.0),
    ):
        if value > high * (1 + slack):
            said.append(f"{word} = {value:.4g} is {value / high:.3g} times the most")
        elif value < low * (1 - slack):
            said.append(f"{word} = {value:.4g} is {value / low:.2g} times the least")
    return " and ".join(said) or None


def nearest(law: Law, option: Option) -> tuple[float, float]:
    """(N, D) of the fitted range that are nearest to an option's."""
    (low_n, high_n), (low_d, high_d) = law.active_params, law.tokens
    return min(max(option.active, low_n), high_n), min(max(option.tokens, low_d), high_d)


def turning_point(law: Law, active: float, sparse: int, other: int) -> float | None:
    """The least D above the fitted range's lower end from which `sparse` is behind `other`; None: not before 1e16."""
    tokens = np.geomspace(law.tokens[0], max(1e16, law.tokens[1] * 1e3), 4000)
    behind = law.loss(active, tokens, sparse) > law.loss(active, tokens, other)
    return float(tokens[behind.argmax()]) if behind.any() else None
