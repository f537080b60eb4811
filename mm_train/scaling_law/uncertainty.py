"""How sure a fit is: bootstrap, what the runs leave open, and losses of scales that were left out. Torch-free.

The bootstrap draws residuals, not runs: a sweep is a grid, and a draw without one of its corners would be another
question. Residuals are scaled up by what the fit took out of them.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import numpy as np

from mm_train.scaling_law.estimate import Fit, Options, Problem, fit, problem
from mm_train.scaling_law.forms import Form, features, predict, why_not
from mm_train.scaling_law.law import Array
from mm_train.scaling_law.runs import Runs

COVERAGE = 0.95
SCALES = ("active_params", "tokens")  # columns of which one value at a time is left out


class LeftOut(NamedTuple):
    """What a fit without the runs of one scale says of these."""

    column: str
    value: float
    runs: int
    rmse: float | None  # nats per token; None: the rest does not determine the form
    why_not: str | None


def bootstrap(task: Problem, best: Fit, samples: int, seed: int, step: Callable[[], object]) -> Array:
    """Parameters [samples, parameters] of fits to losses drawn anew; `step` is called after each."""
    rng = np.random.default_rng(seed)
    said = predict(task.form, task.terms, best.theta)
    runs, held = len(said), task.floor[1] - task.floor[0] < 0.1
    free = len(best.theta) - held
    residuals = (task.log_loss - said) * math.sqrt(runs / max(1, runs - free))
    begin = [best.theta, *best.others]
    draws = []
    for _ in range(samples):
        drawn = replace(task, log_loss=said + rng.choice(residuals - residuals.mean(), runs))
        draws.append(fit(drawn, begin).theta)
        step()
    return np.array(draws)


def interval(draws: Array) -> tuple[Array, Array]:
    """Lower and upper end of the middle COVERAGE of draws [samples, ...]."""
    tail = (1 - COVERAGE) / 2
    low, high = np.quantile(draws, (tail, 1 - tail), axis=0)
    return low, high


def correlations(draws: Array, names: tuple[str, ...], least: float = 0.9) -> list[tuple[str, str, float]]:
    """Pairs of parameters that move together from draw to draw: |r| of at least `least`, the closest first.

    Of such a pair the runs determine one combination and hardly the other: the interval of each is wide, and yet the
    predictions are sure.
    """
    moving = np.ptp(draws, axis=0) > 0
    table = np.zeros((len(names), len(names)))
    table[np.ix_(moving, moving)] = np.corrcoef(draws[:, moving], rowvar=False)
    pairs = [(names[i], names[j], float(table[i, j])) for j in range(len(names)) for i in range(j)]
    return sorted((pair for pair in pairs if abs(pair[2]) >= least), key=lambda pair: -abs(pair[2]))


def principal_direction(draws: Array, names: tuple[str, ...]) -> tuple[float, dict[str, float]]:
    """The direction in which the draws scatter most, in standard deviations of each parameter, and its share of all."""
    deviation = draws.std(0)
    scaled = (draws - draws.mean(0)) / np.where(deviation > 0, deviation, 1)
    values, vectors = np.linalg.eigh(np.cov(scaled, rowvar=False))
    loading = vectors[:, -1] * np.sign(vectors[np.abs(vectors[:, -1]).argmax(), -1])
    return float(values[-1] / values.sum()), dict(zip(names, map(float, loading), strict=True))


def scales_to_leave_out(runs: Runs) -> list[tuple[str, float]]:
    """(column, value) of every scale."""
    return [(column, value) for column in SCALES for value in runs.values(column)]


def leave_one_out(form: Form, runs: Runs, options: Options, column: str, value: float) -> LeftOut:
    """Fit without the runs whose `column` is `value`, from all starts, and compare what it says of them."""
    out = getattr(runs, column) == value
    lack = why_not(form, runs.where(~out), options.c is not None)
    if lack:
        return LeftOut(column, value, int(out.sum()), None, lack)
    theta = fit(problem(form, runs.where(~out), options)).theta
    left = runs.where(out)
    said = np.exp(predict(form, features(form, left, options.unit, options.e_max), theta))
    return LeftOut(column, value, len(left), rmse(said, left.loss), None)


def rmse(said: Array, measured: Array) -> float:
    """Root of the mean square, in nats per token."""
    return float(np.sqrt(np.mean((said - measured) ** 2)))
