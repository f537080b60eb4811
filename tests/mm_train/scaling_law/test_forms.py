"""The forms against the law itself, and their gradient against differences."""

import math
from dataclasses import replace

import numpy as np
import pytest

from mm_train.scaling_law.forms import FIXED, JOINT, features, jacobian, predict, why_not
from mm_train.scaling_law.law import PUBLISHED
from tests.mm_train.scaling_law.synthetic import sweep


def published(form, expansion=8):
    """The published coefficients as parameters of a form."""
    k = PUBLISHED.coefficients if form is JOINT else PUBLISHED.reduced(expansion)
    return np.array([math.log(getattr(k, n)) if n in ("A", "B", "c") else getattr(k, n) for n in form.names])


def test_the_joint_form_is_equation_1():
    runs = sweep()
    theta = published(JOINT)
    assert np.exp(predict(JOINT, features(JOINT, runs, 1e9, 32), theta)) == pytest.approx(runs.loss, abs=1e-12)
    assert JOINT.coefficients(theta) == pytest.approx(PUBLISHED.coefficients)


def test_the_fixed_form_is_equation_1_at_one_expansion():
    runs = sweep(expansions=(8,))
    said = predict(FIXED, features(FIXED, runs, 1e9, 32), published(FIXED))
    assert np.exp(said) == pytest.approx(runs.loss, abs=1e-12)


@pytest.mark.parametrize("form", [JOINT, FIXED])
def test_the_gradient_is_that_of_differences(form):
    terms = features(form, sweep(), 1e9, 32)
    theta = published(form) + np.random.default_rng(0).normal(0, 0.1, len(form.names))
    slopes = jacobian(form, terms, theta)[1]
    for index, name in enumerate(form.names):
        step = np.zeros_like(theta)
        step[index] = 1e-6
        difference = (predict(form, terms, theta + step) - predict(form, terms, theta - step)) / 2e-6
        assert slopes[:, index] == pytest.approx(difference, abs=1e-8), name


def test_exponents_that_overflow_alone_do_not_overflow_together():
    terms = features(FIXED, sweep(expansions=(8,)), 1e9, 32)
    assert predict(FIXED, terms, np.array([800.0, 0, 0, 0, 0])) == pytest.approx(800)


@pytest.mark.parametrize(
    ("form", "held", "keep", "says"),
    [
        (JOINT, False, lambda runs: runs.active_params == 0.3e9, "1 distinct sizes"),
        (JOINT, False, lambda runs: runs.tokens <= 200e9, "2 distinct token budgets, at least 3"),
        (JOINT, False, lambda runs: runs.expansion <= 2, "2 distinct expansions, at least 3"),
        (FIXED, False, lambda runs: runs.active_params < 0.9e9, "2 distinct sizes"),
        (FIXED, True, lambda runs: runs.active_params < 0.5e9, "1 distinct sizes"),
        (FIXED, True, lambda runs: (runs.expansion == 8) & (runs.tokens < 300e9) & (runs.active_params < 0.9e9),
         "4 runs for 4 free parameters"),
    ],
)  # fmt: skip
def test_too_little_is_told(form, held, keep, says):
    runs = sweep()
    assert says in why_not(form, runs.where(keep(runs)), held)
    assert why_not(form, runs, held) is None


def test_dense_runs_count_as_an_expansion():
    runs = sweep(expansions=(1, 4, 8))
    assert why_not(JOINT, runs, False) is None
    assert why_not(JOINT, replace(runs.sparse), False)
