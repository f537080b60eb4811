"""Synthetic sweeps: the published law over the grid of the paper, with noise or without."""

from pathlib import Path

import numpy as np

from mm_train.scaling_law.law import PUBLISHED
from mm_train.scaling_law.runs import COLUMNS, Runs


def sweep(noise: float = 0.0, seed: int = 0, expansions=(1, 2, 4, 8, 16, 32), scale: float = 1.0) -> Runs:
    """N .3, .5, .9 B and D 100..500 B (written `scale` times as large), losses with normal noise of that RMSE."""
    axes = ([0.3e9, 0.5e9, 0.9e9], np.linspace(100e9, 500e9, 5), expansions)
    n, d, e = (grid.ravel() for grid in np.meshgrid(*axes, indexing="ij"))
    loss = PUBLISHED.loss(n, d, e) + noise * np.random.default_rng(seed).standard_normal(n.shape)
    one = np.ones(n.shape)
    return Runs(n * scale, n * e * scale, d * scale, e.astype(float), 8 * one, one, 0 * one, loss)


def write(runs: Runs, path: Path) -> Path:
    """As a table, with a column that nobody asked for."""
    lines = [",".join(["name", *COLUMNS, "note"])]
    for index in range(len(runs)):
        values = [f"{getattr(runs, column)[index]:.12g}" for column in COLUMNS]
        lines.append(",".join([f"r{index}", *values, "ignored"]))
    path.write_text("\n".join(lines) + "\n")
    return path
