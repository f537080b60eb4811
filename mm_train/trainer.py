"""What a training run is made of, and what it can do: one step, a checkpoint, a validation, going back.

train.py builds one and loops over it. Everything that decides about the next step (position in the data, what was
skipped, recent losses) is in `facts`, which go into every checkpoint: a resumed run does what an uninterrupted one
does.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_train import config, optim
from mm_train.anomalies import Anomalies, Verdict
from mm_train.checkpoint.folders import latest
from mm_train.checkpoint.format import FACTS
from mm_train.checkpoint.reader import Reader, check_data, open_newest, restore
from mm_train.checkpoint.writer import Writer
from mm_train.data import Loader
from mm_train.engine import Engine
from mm_train.evaluations import Evaluations
from mm_train.metrics import Metrics
from mm_train.parallel.groups import Groups
from mm_train.shards import ShardReader
from mm_train.statistics import Interval, StepTotals
from mm_train.validate import validate
from mm_train.watchdog import Watchdog


@dataclass
class Outcome:
    """What came of a step."""

    totals: StepTotals
    norms: dict[str, float]  # of the gradient before clipping, by part and "total"
    rate: float
    verdict: Verdict


class Trainer:
    """A run under way.

    `step` counts optimizer steps that were done or skipped, `updates` those of them that were applied, `left_out` the
    samples that rollbacks passed over.
    """

    def __init__(
        self,
        cfg: config.Config,
        groups: Groups,
        engine: Engine,
        loader: Loader,
        metrics: Metrics,
        watchdog: Watchdog,
    ) -> None:
        self.cfg, self.groups, self.engine, self.loader = cfg, groups, engine, loader
        self.metrics, self.watchdog = metrics, watchdog
        self.run_dir = Path(cfg.run.dir)
        self.rows = cfg.train.global_batch_tokens // cfg.data.seq_len
        self.step = self.updates = self.left_out = 0
        self.data_change: str | None = None  # between the checkpoint gone on from and now, in words
        self.schedule_change: str | None = None  # likewise
        self.anomalies = Anomalies(cfg.faults)
        self.writer = Writer(self.run_dir, groups, cfg, beat=lambda: self._beat("checkpoint"))
        self.writer.reserve(engine)
        self.evaluations = Evaluations(cfg, metrics, groups.is_main)
        self.stalled: dict[int, float] = {}  # seconds that the loop stood still for checkpoints under way, by step
        self.interval = Interval(cfg, groups, sorted(loader.readers))
        self.biases = [layer.expert_bias for layer in engine.model.moe_layers()]
        for layer in engine.model.moe_layers():
            layer.dispatcher.clock = self.interval.clock

    # --- one step -------------------------------------------------------------------------------------------------

    def train_step(self, stop: bool) -> Outcome:
        """Forward, backward and, unless the verdict is against it, the update of one global batch. Collective.

        `stop`: whether this rank was asked to stop; Outcome.totals.stop says whether any was.
        """
        cfg, clock = self.cfg, self.interval.clock
        totals = self._accumulate(stop)
        with clock.phase("optimizer"):
            norms = optim.gradient_norms(self.engine, self.groups)
            verdict = self.anomalies.judge(totals.loss, norms["total"])
            rate = optim.learning_rate(self.step, cfg.total_steps, cfg.optim)
            if verdict.action in ("ok", "warn"):
                optim.clip(self.engine, norms["total"], cfg.optim.clip_grad_norm)
                self._settle()
                self.engine.step(rate)
                optim.update_expert_bias(self.biases, totals.counts_LE, cfg.moe.bias_update_rate)
                self.updates += 1
            else:
                self.engine.discard()
                self.interval.forget_step()
        self.step += 1
        return Outcome(totals, norms, rate, verdict)

    def _accumulate(self, stop: bool) -> StepTotals:
        """Gradients of the global batch, and its totals over all ranks."""
        cfg, groups, clock = self.cfg, self.groups, self.interval.clock
        self._beat("data")
        with clock.phase("data"):
            share = (self.rows, cfg.train.micro_batch_size, groups.dp_rank, groups.dp_size)
            batches = list(self.loader.micro_batches(self.samples, *share))
        scored = groups.sum(torch.tensor(float(sum(b.num_scored for b in batches)), device=groups.device))
        scored.clamp_(min=1)  # a batch may have nothing to score
        for batch in batches:
            self._beat("forward")
            with clock.phase("forward"):
                losses = self.engine.forward(batch.to(groups.device))
                loss = losses.cross_entropy_sum / scored
                z_loss = losses.z_loss_sum / cfg.train.global_batch_tokens
            self._beat("backward")
            with clock.phase("backward"):
                self.engine.backward((loss + cfg.moe.z_loss_weight * z_loss) * self.engine.loss_scale)
            self.interval.add_micro(losses, batch)
        self._beat("optimizer")
        return self.interval.finish_step(float(scored), stop)

    def values(self, outcome: Outcome) -> dict[str, Any]:
        """What is logged of the interval that ends with this step."""
        counts = {key: getattr(self.anomalies, key) for key in ("skipped_steps", "rollbacks")}
        parts = {part: norm for part, norm in outcome.norms.items() if part != "total"}
        norms = {"grad_norm": outcome.norms["total"], "grad_norm_parts": parts}
        return self.interval.values(self.step) | {"lr": outcome.rate} | norms | counts

    @property
    def samples(self) -> int:
        """Position in the data: the first sample of the next step."""
        return self.step * self.rows + self.left_out

    def _beat(self, phase: str) -> None:
        self.watchdog.beat(self.step + 1, phase)

    # --- checkpoints ----------------------------------------------------------------------------------------------

    @property
    def facts(self) -> dict[str, Any]:
        """What a checkpoint says beside the tensors."""
        return {
            "samples": self.samples,
            "rows_per_step": self.rows,
            "updates": self.updates,
            "data": self.loader.identity,
            "anomalies": self.anomalies.state(),
        }

    def save(self) -> None:
        """Begin, or do, the writing of a checkpoint. Collective."""
        self._beat("checkpoint")
        with self.interval.clock.phase("checkpoint"):
            self.stalled[self.step] = self.writer.save(self.step, self.engine, self.facts)
        self.report_written()

    def _settle(self) -> None:
        """Wait until the checkpoint under way, if any, is copied: what it is copied from is about to change."""
        with self.interval.clock.phase("checkpoint"):
            seconds = self.writer.settle()
        for step in self.stalled:  # at most one: a save waits for the one before
            self.stalled[step] += seconds

    def finish_writing(self) -> None:
        """Wait until every checkpoint is on the disk."""
        self._beat("checkpoint")
        with self.interval.clock.phase("checkpoint"):
            self.writer.wait()
        self.report_written()

    def report_written(self) -> None:
        """Log checkpoints and evaluations that were finished meanwhile.

        Raises UserError when a checkpoint could not be written.
        """
        self.evaluations.look(self.step)
        for written in self.writer.poll():
            stalled = self.stalled.pop(written.step, None)
            values = {"seconds": written.seconds, "stalled_seconds": stalled, "bytes": written.bytes}
            self.metrics.checkpoint(written.step, **values)
            self.evaluations.look(self.step, written.folder)

    def resume(self, reader: Reader) -> None:
        """Take over everything from a checkpoint. Raises UserError when it is of another network or other data."""
        reader.check_model(self.cfg.model)
        reader.check_optimizer(self.cfg.optim)
        self.schedule_change = optim.schedule_change(reader.step, reader.run_config, self.cfg, reader.folder)
        if all(key in reader.manifest for key in FACTS):
            there, sample = reader.manifest["data"], reader.manifest["samples"]
            self.data_change = self.loader.follow(there, sample, self.cfg.data.on_change)
        check_data(reader, self.loader.identity, self.rows, mixture_has_changed=self.data_change is not None)
        self._settle()
        restore(reader, self.engine, self.groups)
        self.step, self.updates = reader.step, reader.manifest["updates"]
        self.engine.restore_step(self.updates)  # AdamW's bias correction knows nothing of steps that were skipped
        self.left_out = reader.manifest["samples"] - self.step * self.rows
        self.anomalies.load(reader.manifest["anomalies"])

    def roll_back(self, reason: str) -> bool:
        """Go back to the last checkpoint and leave out the data since; False when there is none. Collective.

        The step that gave the reason was counted and not applied.
        """
        self.finish_writing()
        reader = open_newest(self.run_dir, self.groups, self.metrics.say)
        if reader is None:
            self.anomalies.skipped_steps += 1
            self.metrics.say("there is no checkpoint to go back to: the step is skipped")
            return False
        left, next_sample, before = self.step, self.samples, self.anomalies
        self.anomalies = Anomalies(self.cfg.faults)
        self.resume(reader)
        before.roll_back(self.anomalies.state())
        self.anomalies = before
        self.left_out = next_sample - self.step * self.rows
        self.metrics.rollback(left, to_step=self.step, reason=reason, rollbacks=self.anomalies.rollbacks)
        return True

    def last_checkpoint(self) -> Path | None:
        """Folder of the newest one, for messages."""
        return latest(self.run_dir)

    # --- validation -----------------------------------------------------------------------------------------------

    def validate(self, held_out: Mapping[str, ShardReader], token_bytes_V: np.ndarray) -> None:
        """Score held-out text and log it. Collective."""
        cfg = self.cfg
        with self.interval.clock.phase("validation"):
            scores = validate(
                self.engine.model,
                held_out,
                token_bytes_V,
                cfg.data.seq_len,
                cfg.train.micro_batch_size,
                self.groups,
                cfg.train.validation_tokens,
                beat=lambda: self._beat("validation"),
            )
        for source, score in scores.items():
            self.metrics.validation(self.step, source, **asdict(score))
