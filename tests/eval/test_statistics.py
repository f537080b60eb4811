import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest

from eval.statistics import interval, mcnemar, paired_bootstrap, wilson


@given(st.integers(1, 300), st.data())
def test_wilsons_interval(n, data):
    successes = data.draw(st.integers(0, n))
    expected = binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert wilson(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-9)


def test_interval_of_scores_in_between_comes_from_their_spread():
    values = [0.0, 0.25, 0.5, 1.0] * 25
    half = 1.959964 * np.std(values, ddof=1) / math.sqrt(100)
    assert interval(values) == pytest.approx((np.mean(values) - half, np.mean(values) + half), abs=1e-6)
    assert interval([0.5]) == (0.0, 1.0)
    assert interval([1.0, 1.0])[1] == 1.0
    assert interval([1.0, 1.0])[0] < 0.5


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), st.sampled_from([0.0, 1.0])), min_size=1, max_size=60))
def test_mcnemar_is_the_binomial_test_of_the_items_where_they_differ(pairs):
    first, second = zip(*pairs, strict=True)
    wins, losses = (sum(pair == want for pair in pairs) for want in ((1.0, 0.0), (0.0, 1.0)))
    expected = binomtest(wins, wins + losses).pvalue if wins + losses else 1.0
    assert mcnemar(first, second) == pytest.approx(expected)


def test_bootstrap_sees_a_difference_and_none():
    generator = np.random.default_rng(1)
    base = generator.random(400)
    low, high, p = paired_bootstrap(base, base + 0.1 + 0.3 * generator.standard_normal(400))
    assert 0 < low < 0.1 < high
    assert p < 0.01
    low, high, p = paired_bootstrap(base, base[generator.permutation(400)])
    assert low < 0 < high
    assert p > 0.05
    assert paired_bootstrap(base, base) == (0.0, 0.0, 1.0)
