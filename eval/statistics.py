"""How sure a score is."""

import math
from collections.abc import Sequence

import numpy as np

Z95 = 1.959963984540054  # of a standard normal, 95 % lie within this
RESAMPLES = 10_000


def wilson(successes: float, n: int) -> tuple[float, float]:
    """95 % interval of a share: right also for few items and near 0 and 1, where score +- 2 errors is not."""
    share, spread = successes / n, Z95**2 / n
    middle = (share + spread / 2) / (1 + spread)
    half = Z95 / (1 + spread) * math.sqrt(share * (1 - share) / n + spread / (4 * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of the mean: Wilson's for 0s and 1s, otherwise from the spread, within 0 and 1."""
    array = np.asarray(values, dtype=float)
    if np.isin(array, (0.0, 1.0)).all():
        return wilson(float(array.sum()), len(array))
    half = Z95 * (float(array.std(ddof=1)) / math.sqrt(len(array)) if len(array) > 1 else 1.0)
    return max(0.0, float(array.mean()) - half), min(1.0, float(array.mean()) + half)


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Two-sided exact p-value that two models are right equally often, from the items where just one of them is."""
    a, b = np.asarray(first), np.asarray(second)
    wins, losses = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    n, fewer = wins + losses, min(wins, losses)
    if n == 0:
        return 1.0
    logs = (
        math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) - n * math.log(2) for k in range(fewer + 1)
    )
    return min(1.0, 2 * sum(map(math.exp, logs)))


def paired_bootstrap(first: Sequence[float], second: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """95 % interval of the difference of means (second less first) and a two-sided p-value, over resampled items."""
    difference = np.asarray(second, dtype=float) - np.asarray(first, dtype=float)
    generator = np.random.default_rng(seed)
    means = np.empty(RESAMPLES)
    for k in range(RESAMPLES):  # one by one: memory does not grow with the number of items
        means[k] = difference[generator.integers(0, len(difference), len(difference))].mean()
    low, high = np.quantile(means, (0.025, 0.975))
    p = 2 * min(float((means <= 0).mean()), float((means >= 0).mean()))
    return float(low), float(high), min(1.0, max(p, 1 / RESAMPLES) if difference.any() else 1.0)
