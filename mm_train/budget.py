"""A stage's length in tokens, when its configuration says it in epochs. Torch-free.

`train.epochs` counts rows: one epoch is as many as all sources of the mixture have together. Where the weights of the
mixture are in proportion to the sources' sizes every source is read so often; elsewhere some are read more often than
others, which training says for each source before its first step.
"""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from mm_train import rules
from mm_train.cli import UserError
from mm_train.config import Config
from mm_train.manifest import NAME, read_manifest


def with_tokens(cfg: Config, num_windows: Mapping[str, int]) -> Config:
    """The config with train.tokens for its train.epochs, checked; the same one when it has no epochs.

    `num_windows` are the rows of data.seq_len tokens of each source of the mixture. The budget is rounded up to whole
    steps, and train.epochs is 0 afterwards: what counts from then on is tokens.
    """
    if not cfg.train.epochs:
        return cfg
    rows = sum(num_windows[name] for name, weight in cfg.data.mixture.items() if weight)
    batch = cfg.train.global_batch_tokens
    steps = -(-round(rows * cfg.train.epochs * cfg.data.seq_len) // batch)
    resolved = replace(cfg, train=replace(cfg.train, tokens=max(1, steps) * batch, epochs=0.0))
    rules.validate_stage(resolved)
    return resolved


def from_folder(cfg: Config) -> Config:
    """`with_tokens` by the manifests of the data set. Raises UserError when they are not in a folder here."""
    if not cfg.train.epochs:
        return cfg
    from mm_train.remote import is_url  # numpy, which mm_train.describe does without

    names = [name for name, weight in cfg.data.mixture.items() if weight]
    folders = {name: Path(cfg.data.path) / name / "train" for name in names}
    missing = [name for name, folder in folders.items() if not (folder / NAME).is_file()]
    if is_url(cfg.data.path) or missing:
        lacks = f" has no {', '.join(missing)}" if missing and not is_url(cfg.data.path) else " is not a folder here"
        raise UserError(
            f"train.epochs is {cfg.train.epochs:g}: how many tokens these are depends on the data set, and"
            f" {cfg.data.path}{lacks}; prepare it, or set train.tokens"
        )
    windows = {name: read_manifest(folder).num_windows(cfg.data.seq_len) for name, folder in folders.items()}
    return with_tokens(cfg, windows)


def said(asked: Config, resolved: Config) -> str | None:
    """What came of train.epochs, as a line for the log; None when the budget was in tokens."""
    if not asked.train.epochs:
        return None
    return (
        f"train.epochs {asked.train.epochs:g} of {asked.data.path}: {resolved.train.tokens:,} tokens,"
        f" {resolved.total_steps:,} steps"
    )
