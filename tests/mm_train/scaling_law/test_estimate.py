"""The search: its gradient, exact recovery without noise, and the paper's sweep with its noise."""

import math

import numpy as np
import pytest

from mm_train.cli import UserError
from mm_train.scaling_law.estimate import Options, fit, problem, starts
from mm_train.scaling_law.forms import FIXED, JOINT, predict
from mm_train.scaling_law.law import PUBLISHED
from tests.mm_train.scaling_law.synthetic import sweep
from tests.mm_train.scaling_law.test_forms import published


@pytest.mark.parametrize("form", [JOINT, FIXED])
def test_the_gradient_is_that_of_differences(form):
    """On both sides of the Huber threshold."""
    task = problem(form, sweep(0.0076), Options())
    point = task.coordinates(published(form)) + 0.01
    slope = task.objective(point)[1]
    for index in range(len(point)):
        step = np.zeros_like(point)
        step[index] = 1e-5
        difference = (task.objective(point + step)[0] - task.objective(point - step)[0]) / 2e-5
        assert slope[index] == pytest.approx(difference, rel=1e-4, abs=1e-3)


def test_search_coordinates_turn_back():
    task = problem(JOINT, sweep(), Options())
    theta = published(JOINT)
    assert task.parameters(task.coordinates(theta)) == pytest.approx(theta)


def test_huber_is_quadratic_below_and_linear_above():
    runs = sweep()
    theta = published(FIXED)
    runs = runs.where(runs.expansion == 8)
    task = problem(FIXED, runs, Options(huber=1e-3))
    base = task.coordinates(theta)
    assert task.objective(base)[0] == pytest.approx(0, abs=1e-12)
    # Everything in L times 1 + 2e-4 is a residual of 0.2 thresholds, times 1.003 one of 3.
    for factor, cost in ((1.0002, 0.2**2 / 2), (1.003, 2.5)):
        moved = theta + math.log(factor) * np.array([1, 0, 1, 0, 1])
        assert task.objective(task.coordinates(moved))[0] / len(runs) == pytest.approx(cost, rel=5e-3)


@pytest.mark.parametrize("unit", [1e9, 1e6])
def test_without_noise_the_reduced_law_comes_back_in_any_unit(unit):
    runs = sweep(expansions=(8,), scale=unit / 1e9)
    best = fit(problem(FIXED, runs, Options(unit=unit)))
    want = PUBLISHED.reduced(8)
    found = FIXED.coefficients(best.theta)
    assert [found.A, found.alpha, found.B, found.beta, found.c] == pytest.approx(list(want), rel=1e-3)


@pytest.mark.slow
def test_without_noise_the_joint_law_comes_back():
    best = fit(problem(JOINT, sweep(), Options()))
    assert JOINT.coefficients(best.theta) == pytest.approx(PUBLISHED.coefficients, rel=5e-3)
    assert best.agreeing >= 2


def test_with_the_papers_noise_predictions_are_right_everywhere_in_the_sweep():
    runs, truth = sweep(0.0076, seed=3), sweep().loss
    task = problem(JOINT, runs, Options())
    best = fit(task)
    assert np.abs(np.exp(predict(JOINT, task.terms, best.theta)) - truth).max() < 0.01
    assert len(starts(task)) == best.starts == 216


def test_a_c_that_is_held_stays():
    runs = sweep(0.003, expansions=(8,))
    best = fit(problem(FIXED, runs, Options(c=1.5, c_within=0.01)))
    assert FIXED.coefficients(best.theta).c == pytest.approx(1.5, rel=0.0101)  # the true one is 1.973


def test_outliers_hardly_move_the_fit():
    runs = sweep(0.003, expansions=(8,))
    spoilt = sweep(0.003, expansions=(8,))
    spoilt.loss[7] += 0.3
    plain, bent = (problem(FIXED, r, Options()) for r in (runs, spoilt))
    said = [np.exp(predict(FIXED, task.terms, fit(task).theta)) for task in (plain, bent)]
    assert np.abs(said[0] - said[1]).max() < 0.005


def test_a_star_of_runs_does_not_tell_the_interplay():
    """Expansion varied at one size only, and size at one expansion: N^(γ ln Ê) cannot be told from Ê^δ."""
    runs = sweep()
    star = runs.where((runs.active_params == 0.5e9) | (runs.expansion == 8))
    with pytest.raises(UserError, match="do not tell A, delta, alpha, gamma apart: vary active_params"):
        problem(JOINT, star, Options())
    problem(JOINT, runs.where((runs.active_params >= 0.5e9) | (runs.expansion == 8)), Options())
