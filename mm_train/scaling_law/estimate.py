"""Finds the parameters of a form: Huber loss on log L, many starts, L-BFGS with the exact gradient.

As Hoffmann et al. (arXiv 2203.15556) do it. Two more things make it quick and sure: the features of a term are turned
into orthonormal ones, so that the parameters of the search hardly pull on each other; and the starts are those of a
grid of exponents, with amplitudes that go through the middle of the runs, so that they suit every unit. Torch-free.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import least_squares, minimize

from mm_train.cli import UserError
from mm_train.scaling_law.forms import FIXED, Form, features, jacobian
from mm_train.scaling_law.law import Array
from mm_train.scaling_law.runs import Runs

HUBER = 3e-3  # residuals of log L beyond it count by their size, not its square; about the noise of the paper's losses
FLOOR_SHARES = (0.3, 0.6, 0.9)  # of c in the least loss
SIZE_SHARES = (0.3, 0.7)  # of the size term in what is above c
EXPONENTS = (-0.1, -0.3, -0.6)
# of what turns with ln Ê: delta, gamma, omega, zeta
TURNS = ((0.0, 0.0, 0.0, 0.0), (0.0, 0.1, 0.0, -0.3), (0.0, -0.1, 0.0, 0.3), (0.0, 0.1, 1.0, -0.3))
GLANCE, FINALISTS = 12, 10  # L-BFGS steps from every start; starts that are followed to the end
LEAST_FLOOR = 0.02  # c is above this share of the least loss: below it, c is none


@dataclass(frozen=True)
class Options:
    """How to fit."""

    unit: float = 1e9
    e_max: float = 32.0
    huber: float = HUBER
    c: float | None = None  # held near it
    c_within: float = 0.01  # so near, as a share of it


class Fit(NamedTuple):
    """The best parameters (amplitudes as logarithms), and how sure that is."""

    theta: Array
    objective: float
    starts: int
    finalists: int
    agreeing: int  # of these, the ones that end within 0.1 % of the lowest objective
    others: tuple[Array, ...]  # other minima that finalists end in


@dataclass(frozen=True)
class Problem:
    """What is minimised: Huber loss of log L - log loss, summed over the runs, in units of huber².

    The search goes in coordinates of its own, in which the features of a term are orthonormal: X = Q R, so that Q takes
    the place of X and R θ that of the parameters θ.
    """

    form: Form
    terms: tuple[Array, Array, Array]  # X
    rotated: tuple[Array, Array, Array]  # Q
    turns: tuple[Array, Array, Array]  # R
    log_loss: Array  # measured
    huber: float
    floor: tuple[float, float]  # allowed log c

    def objective(self, point: Array) -> tuple[float, Array]:
        """Value and gradient [parameters] in search coordinates."""
        log_loss, slopes = jacobian(self.form, self.rotated, point)
        residual = (log_loss - self.log_loss) / self.huber
        size = np.abs(residual)
        value = np.where(size <= 1, residual**2 / 2, size - 0.5).sum()
        return float(value), np.clip(residual, -1, 1) @ slopes / self.huber

    def parameters(self, point: Array) -> Array:
        """Search coordinates -> parameters."""
        pairs = zip(self.turns, self.form.terms, strict=True)
        return np.concatenate([np.linalg.solve(turn, point[part]) for turn, part in pairs])

    def coordinates(self, theta: Array) -> Array:
        """Parameters -> search coordinates."""
        return np.concatenate([turn @ theta[part] for turn, part in zip(self.turns, self.form.terms, strict=True)])


def problem(form: Form, runs: Runs, options: Options) -> Problem:
    """Raises UserError where the runs vary too little together for all parameters of a term."""
    terms = features(form, runs, options.unit, options.e_max)
    for x, names, axis in ((terms[0], form.size, "active_params"), (terms[1], form.data, "tokens")):
        scale = np.linalg.norm(x, axis=0)
        if np.linalg.matrix_rank(x / np.where(scale > 0, scale, 1), tol=1e-6) < x.shape[1]:
            raise UserError(
                f"the runs do not tell {', '.join(names)} apart: vary {axis}"
                + ("" if form is FIXED else " at more than one expansion, and expansion at more than one of them")
            )
    if options.c is None:
        least = float(runs.loss.min())
        floor = (math.log(LEAST_FLOOR * least), math.log(least))
    else:
        floor = (math.log(options.c * (1 - options.c_within)), math.log(options.c * (1 + options.c_within)))
    (q1, r1), (q2, r2) = (np.linalg.qr(x) for x in terms[:2])
    one = np.ones((1, 1))
    return Problem(form, terms, (q1, q2, terms[2]), (r1, r2, one), np.log(runs.loss), options.huber, floor)


def starts(task: Problem) -> list[Array]:
    """Parameters to begin from."""
    low, high = task.floor
    least, middle = math.exp(task.log_loss.min()), math.exp(np.median(task.log_loss))
    floors = [math.log(share * least) for share in FLOOR_SHARES if low < math.log(share * least) < high]
    found = []
    of_form = TURNS if task.form is not FIXED else ((0.0, 0.0, 0.0, 0.0),)
    for floor, share, alpha, beta, (delta, gamma, omega, zeta) in itertools.product(
        floors or [(low + high) / 2], SIZE_SHARES, EXPONENTS, EXPONENTS, of_form
    ):
        above = max(middle - math.exp(floor), 1e-3 * middle)
        size, data = [0.0, alpha], [0.0, beta]
        if task.form is not FIXED:
            size, data = [0.0, delta, alpha, gamma], [0.0, omega, beta, zeta]
        for term, x, part in ((size, task.terms[0], share * above), (data, task.terms[1], (1 - share) * above)):
            term[0] = math.log(part) - float(x.mean(0) @ np.array(term))
        found.append(np.array([*size, *data, floor]))
    return found


def descend(task: Problem, start: Array, steps: int = 3000) -> tuple[float, Array]:
    """The minimum below a start, or what `steps` of L-BFGS reach: objective and parameters."""
    free = len(start) - 1
    with np.errstate(all="ignore"):  # a step too far overflows, and the line search turns back from it
        result = minimize(
            task.objective,
            task.coordinates(start),
            jac=True,
            method="L-BFGS-B",
            bounds=[(None, None)] * free + [task.floor],
            options={"maxiter": steps, "maxfun": 2 * steps, "maxcor": 20, "ftol": 1e-10, "gtol": 1e-5},
        )
    return float(result.fun), task.parameters(result.x)


def settle(task: Problem, start: Array) -> tuple[float, Array]:
    """The last digits: a trust region with the same loss and the curvature of the Jacobian.

    L-BFGS stops early in the flat valleys that a small sweep leaves; intervals would come out too narrow.
    """
    low, high = np.full(len(start), -np.inf), np.full(len(start), np.inf)
    low[-1], high[-1] = task.floor
    inside = 1e-6 * (high[-1] - low[-1])
    point = task.coordinates(start)
    point[-1] = np.clip(point[-1], low[-1] + inside, high[-1] - inside)
    with np.errstate(all="ignore"):
        result = least_squares(
            lambda x: (jacobian(task.form, task.rotated, x)[0] - task.log_loss) / task.huber,
            point,
            lambda x: jacobian(task.form, task.rotated, x)[1] / task.huber,
            bounds=(low, high),
            loss="huber",
            max_nfev=300,
        )
    return float(result.cost), task.parameters(result.x)


def fit(task: Problem, begin: Sequence[Array] = ()) -> Fit:
    """Take a few steps from every start of the grid, then go on to the end from the best of them.

    `begin` replaces the grid by minima of nearly the same problem, from which the end is near.
    """
    tried = _sorted([descend(task, start, GLANCE) for start in ([] if begin else starts(task))])
    near = begin or [descend(task, start)[1] for _, start in tried[:FINALISTS]]
    ends = _sorted([settle(task, start) for start in near])
    if not ends:
        raise UserError("no start of the search led anywhere: are the losses of one kind, in nats per token?")
    best, theta = ends[0]
    agreeing = sum(value <= best * 1.001 + 1e-9 for value, _ in ends)
    others: list[Array] = []  # one of each other minimum
    for value, other in ends[1:]:
        if value > best * 1.001 + 1e-9 and all(np.abs(other - seen).max() > 0.05 for seen in others):
            others.append(other)
    return Fit(theta, best, len(tried) or len(begin), len(ends), agreeing, tuple(others[:3]))


def _sorted(ends: list[tuple[float, Array]]) -> list[tuple[float, Array]]:
    return sorted((end for end in ends if math.isfinite(end[0])), key=lambda end: end[0])
