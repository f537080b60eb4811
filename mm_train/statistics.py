"""What happened since the last log line, summed over micro-steps and ranks.

One small all-reduce a step carries all sums: the expert-bias update needs the counts of the global batch anyway.
"""

import time
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from mm_train import config
from mm_train.model import Losses
from mm_train.parallel import Groups


class Interval:
    """Sums of Losses, and the clock. `add_micro` per micro-batch, `finish_step` per step, `values` per log line."""

    def __init__(self, cfg: config.Config, groups: Groups) -> None:
        self.cfg, self.groups = cfg, groups
        self.start()

    def start(self) -> None:
        """Forget the interval that was logged and begin the next."""
        self.began = time.perf_counter()
        self.data_seconds = 0.0
        self.steps = 0
        self.totals: Tensor | None = None
        self.scored = 0.0
        self._step: Tensor | None = None

    def exclude(self, seconds: float) -> None:
        """Leave validation and checkpoint time out of the throughput."""
        self.began += seconds

    def add_micro(self, losses: Losses) -> None:
        """Add one micro-batch of this rank."""
        parts = (losses.cross_entropy_sum, losses.z_loss_sum, losses.dropped_L.sum())
        sums = torch.cat([torch.stack([p.detach().double() for p in parts]), losses.counts_LE.flatten().double()])
        self._step = sums if self._step is None else self._step + sums

    def finish_step(self, scored: float) -> Tensor:
        """Sum the step over ranks; returns counts_LE of the global batch. `scored`: its tokens in the loss."""
        assert self._step is not None, "finish_step follows add_micro"
        totals = self.groups.sum(self._step)
        self._step = None
        self.totals = totals if self.totals is None else self.totals + totals
        self.scored += scored
        self.steps += 1
        return self._counts(totals)

    def values(self, step: int) -> dict[str, object]:
        """The interval's facts for Metrics.train; `step` is the last one in it."""
        assert self.totals is not None, "values follows finish_step"
        model, tokens = self.cfg.model, self.steps * self.cfg.train.global_batch_tokens
        nats, z_loss, dropped = self.totals[:3].tolist()
        counts_LE = self._counts(self.totals)
        slots = tokens * model.num_experts_per_tok * len(counts_LE)
        return {
            "tokens": step * self.cfg.train.global_batch_tokens,
            "loss": nats / max(self.scored, 1),
            "z_loss": z_loss / tokens,
            "dropped_fraction": dropped / slots if slots else None,
            "expert_load": (counts_LE / counts_LE.sum(1, keepdim=True)).tolist(),
            "tokens_per_second": tokens / (time.perf_counter() - self.began),
            "data_seconds": self.data_seconds,
            "mfu": None,
        }

    def _counts(self, totals: Tensor) -> Tensor:
        """counts_LE; no rows in a dense network."""
        return totals[3:].view(-1, max(1, self.cfg.model.num_local_experts))


def progress(steps: range, cfg: config.Config, groups: Groups) -> Iterator[int]:
    """The steps under a progress bar with ETA, on the main rank of a terminal."""
    bar: Iterable[int] = tqdm(
        steps,
        desc=cfg.run.stage,
        total=cfg.total_steps,
        initial=steps.start,
        unit="step",
        disable=None if groups.is_main else True,
        dynamic_ncols=True,
    )
    yield from bar
