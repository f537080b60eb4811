"""Bootstrap, what the runs leave open, and scales left out, on synthetic sweeps whose truth is known."""

import numpy as np
import pytest

from mm_train.scaling_law import uncertainty
from mm_train.scaling_law.estimate import Options, fit, problem
from mm_train.scaling_law.forms import FIXED, JOINT, predict
from mm_train.scaling_law.law import PUBLISHED
from tests.mm_train.scaling_law.synthetic import sweep

NOISE = 0.0076


@pytest.fixture(scope="module")
def drawn():
    """(task, fit, draws) of one expansion, with the noise of the paper."""
    task = problem(FIXED, sweep(NOISE, expansions=(8,)), Options())
    best = fit(task)
    steps = []
    draws = uncertainty.bootstrap(task, best, 30, 0, lambda: steps.append(1))
    assert len(steps) == len(draws) == 30
    return task, best, draws


def test_the_draws_are_those_of_the_seed(drawn):
    task, best, draws = drawn
    again = uncertainty.bootstrap(task, best, 2, 0, lambda: None)
    assert (again == draws[:2]).all()
    assert (uncertainty.bootstrap(task, best, 2, 1, lambda: None) != draws[:2]).any()


def test_intervals_hold_the_truth_of_most_predictions(drawn):
    task, _, draws = drawn
    low, high = uncertainty.interval(np.exp([predict(FIXED, task.terms, draw) for draw in draws]))
    truth = sweep(expansions=(8,)).loss
    assert ((low <= truth) & (truth <= high)).mean() > 0.7
    assert (high - low).max() < 0.04


def test_what_moves_together_is_found(drawn):
    """Three sizes hardly tell A, alpha and c apart."""
    pairs = uncertainty.correlations(drawn[2], FIXED.names)
    assert {"A", "alpha"} in [set(pair[:2]) for pair in pairs]
    share, loadings = uncertainty.principal_direction(drawn[2], FIXED.names)
    assert 0.2 < share <= 1
    assert sum(value**2 for value in loadings.values()) == pytest.approx(1)


def test_correlations_of_what_does_not_move_are_left_out():
    draws = np.stack([np.arange(9.0), -np.arange(9.0), np.ones(9)], 1)
    assert uncertainty.correlations(draws, ("a", "b", "c")) == [("a", "b", pytest.approx(-1))]


def test_a_scale_that_is_left_out_is_predicted():
    runs = sweep(expansions=(8,))
    out = uncertainty.leave_one_out(FIXED, runs, Options(), "tokens", 500e9)
    assert out.runs == 3
    assert out.rmse == pytest.approx(0, abs=1e-3)
    out = uncertainty.leave_one_out(FIXED, runs, Options(), "active_params", 0.9e9)
    assert out.rmse is None
    assert "2 distinct sizes" in out.why_not
    assert len(uncertainty.scales_to_leave_out(runs)) == 8


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_published_coefficients_and_predictions_are_inside_the_intervals(seed):
    task = problem(JOINT, sweep(NOISE, seed), Options())
    best = fit(task)
    draws = uncertainty.bootstrap(task, best, 100, 0, lambda: None)
    low, high = uncertainty.interval(np.array([JOINT.coefficients(draw) for draw in draws]))
    assert ((low <= PUBLISHED.coefficients) & (PUBLISHED.coefficients <= high)).sum() >= 6
    said = np.exp(predict(JOINT, task.terms, best.theta))
    assert np.abs(said - sweep().loss).max() < 0.01
    low, high = uncertainty.interval(np.exp([predict(JOINT, task.terms, draw) for draw in draws]))
    assert ((low <= sweep().loss) & (sweep().loss <= high)).mean() > 0.85
