"""The average of the weights of several checkpoints, whatever layouts wrote them: a checkpoint without moments.

Every tensor is read, averaged in float64 and written piece by piece. The selection bias of the experts is averaged like
the rest: it was balanced together with the router's weights of its step, to which the averaged scores are near, and its
steps of a fixed size make it jitter around where it belongs.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from mm_train import config
from mm_train.checkpoint.convert import refuse_existing, rewrite
from mm_train.checkpoint.folders import candidates, find
from mm_train.checkpoint.reader import Reader
from mm_train.cli import UserError
from mm_train.inventory import KINDS
from mm_train.sharding import Box


def average(paths: Sequence[Path], out: Path, last: int | None = None, ema: float | None = None) -> Path:
    """Write the average of checkpoints to the new folder `out`; returns it.

    `paths` are checkpoint folders, oldest first, or one run, of which the `last` newest count. All weigh the same, or
    with `ema` each that factor times what the next one weighs. The manifest is the newest's, and says what went in.
    Raises UserError for too few checkpoints, for damaged ones and for those of different networks.
    """
    if ema is not None and not 0 < ema < 1:
        raise UserError(
            f"--ema is {ema}; it must lie between 0 and 1: 0.5 halves the weight from checkpoint to checkpoint"
        )
    refuse_existing(out)
    readers = [Reader(folder).verify() for folder in _folders(paths, last)]
    newest = readers[-1]
    for reader in readers[:-1]:
        difference = config.model_difference(newest.model_config, reader.model_config)
        if not difference and reader.run_config.quant != newest.run_config.quant:
            difference = "quant is not the same"
        if difference:
            raise UserError(f"{reader.folder} cannot be averaged with {newest.folder}: {difference}")
    shares = weights(len(readers), ema)

    def read(name: str, kind: str, box: Box, start: int, stop: int) -> Tensor:
        total = torch.zeros(stop - start, dtype=torch.float64)
        for share, reader in zip(shares, readers, strict=True):
            total += share * reader.read_range(name, kind, box, start, stop).double()
        return total.float()

    sources = [
        {"folder": str(reader.folder), "step": reader.step, "sha256": reader.manifest["sha256"], "share": share}
        for share, reader in zip(shares, readers, strict=True)
    ]
    rewrite(newest, out, 1, KINDS[:1], read, {"average": sources})
    return out


def weights(number: int, ema: float | None = None) -> list[float]:
    """What each of `number` checkpoints counts, oldest first; the sum is 1."""
    shares = [(1.0 if ema is None else ema) ** (number - 1 - index) for index in range(number)]
    return [share / sum(shares) for share in shares]


def _folders(paths: Sequence[Path], last: int | None) -> list[Path]:
    """Checkpoints to be averaged, oldest first."""
    if last is None:
        if len(paths) < 2:
            raise UserError(f"{paths[0]} alone is no average: name several checkpoints, or a run with --last N")
        return [find(path) for path in paths]
    if len(paths) != 1:
        raise UserError(f"--last counts the checkpoints of one run, not of {len(paths)} folders")
    if last < 2:
        raise UserError(f"--last is {last}; it must be at least 2")
    found = candidates(paths[0])[0]
    if len(found) < last:
        raise UserError(
            f"--last is {last}, and {paths[0]} has {len(found)} checkpoints: runs keep checkpoint.keep of them, and"
            " multiples of checkpoint.keep_every"
        )
    return found[last - 1 :: -1]
