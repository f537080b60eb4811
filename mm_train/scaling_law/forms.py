"""Equation (1) and its reduced forms as one shape: log L is the logarithm of a sum of three exponentials.

    log L = log(exp(X1 θ1) + exp(X2 θ2) + exp(X3 θ3))

The terms stand for size, data and what cannot be learned; each exponent is linear in its parameters. That makes the
gradient two lines for every form: the share of a term in the loss, times its features. Torch-free.
"""

from dataclasses import dataclass

import numpy as np

from mm_train.cli import UserError
from mm_train.scaling_law.law import Array, Coefficients, effective_expansion
from mm_train.scaling_law.runs import Runs


@dataclass(frozen=True)
class Form:
    """A way to write the law: the parameters of its three terms in order, amplitudes as their logarithms."""

    name: str
    size: tuple[str, ...]
    data: tuple[str, ...]
    least: dict[str, int]  # distinct values of a column that are needed for the parameters to be determined
    least_held: dict[str, int]  # likewise when c is held

    @property
    def names(self) -> tuple[str, ...]:
        """All parameters, amplitudes by their own names."""
        return (*self.size, *self.data, "c")

    @property
    def terms(self) -> tuple[slice, slice, slice]:
        """Where the parameters of each term are among all."""
        first, second = len(self.size), len(self.size) + len(self.data)
        return slice(0, first), slice(first, second), slice(second, second + 1)

    def coefficients(self, theta: Array) -> Coefficients:
        """Parameters as coefficients of equation (1); what a reduced form lacks is 0."""
        values = dict(zip(self.names, (float(value) for value in theta), strict=True))
        return Coefficients(
            **{name: values.get(name, 0.0) for name in Coefficients._fields if name not in ("A", "B", "c")},
            **{name: float(np.exp(values[name])) for name in ("A", "B", "c")},
        )


JOINT = Form(
    "joint",
    ("A", "delta", "alpha", "gamma"),
    ("B", "omega", "beta", "zeta"),
    # Each expansion tells a size term of its own, so that two sizes do when there are three expansions.
    {"active_params": 2, "tokens": 3, "expansion": 3},
    {"active_params": 2, "tokens": 2, "expansion": 2},
)
FIXED = Form(
    "fixed",
    ("A", "alpha"),
    ("B", "beta"),
    {"active_params": 3, "tokens": 3},
    {"active_params": 2, "tokens": 2},
)


def features(form: Form, runs: Runs, unit: float, e_max: float) -> tuple[Array, Array, Array]:
    """X1, X2, X3 [runs, parameters of the term]."""
    one = np.ones(len(runs))
    n, d = np.log(runs.active_params / unit), np.log(runs.tokens / unit)
    if form is FIXED:
        return np.stack([one, n], 1), np.stack([one, d], 1), one[:, None]
    e = np.log(effective_expansion(runs.expansion, e_max=e_max))
    return np.stack([one, e, n, n * e], 1), np.stack([one, e, d, d * e], 1), one[:, None]


def predict(form: Form, terms: tuple[Array, Array, Array], theta: Array) -> Array:
    """log L [runs]."""
    return jacobian(form, terms, theta)[0]


def jacobian(form: Form, terms: tuple[Array, Array, Array], theta: Array) -> tuple[Array, Array]:
    """log L [runs], and its derivatives [runs, parameters]."""
    exponents = [x @ theta[part] for x, part in zip(terms, form.terms, strict=True)]
    highest = np.maximum(np.maximum(exponents[0], exponents[1]), exponents[2])
    powers = [np.exp(exponent - highest) for exponent in exponents]
    total = powers[0] + powers[1] + powers[2]
    slopes = [(power / total)[:, None] * x for power, x in zip(powers, terms, strict=True)]
    return highest + np.log(total), np.concatenate(slopes, 1)


def why_not(form: Form, runs: Runs, held: bool) -> str | None:
    """What the runs lack for the form, in words; None when they could determine it. `held`: c is known."""
    for column, least in (form.least_held if held else form.least).items():
        found = len(runs.values(column))
        if found < least:
            word = {"active_params": "sizes (active_params)", "tokens": "token budgets", "expansion": "expansions"}
            return f"{found} distinct {word[column]}, at least {least} are needed"
    parameters = len(form.names) - held
    if len(runs) <= parameters:
        return f"{len(runs)} runs for {parameters} free parameters, at least {parameters + 1} are needed"
    return None


def require(form: Form, runs: Runs, held: bool, what: str) -> None:
    """Raise UserError when the runs cannot determine the form; `what` says of what they are."""
    lack = why_not(form, runs, held)
    if lack:
        raise UserError(f"too little to fit {what}: {lack}")
