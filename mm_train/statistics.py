"""What happened since the last log line, summed over micro-steps and ranks.

One small all-reduce a step carries all sums: the expert-bias update needs the counts of the global batch anyway.
"""

import re
import resource
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from mm_train import config, costs
from mm_train.data import Batch
from mm_train.log_lines import load_spread
from mm_train.model import Losses
from mm_train.parallel.groups import Groups
from mm_train.timing import Clock

GIB = 2**30

# torch.cuda.get_device_name -> the data sheet in costs.GPUS. Whole names only: a slice of a GPU (MIG), a GH200 or an
# H100 NVL has another peak, and an unknown one has none rather than a wrong one.
DEVICE_NAMES = {
    r"(NVIDIA )?A100-(SXM4|PCIE)-40GB": "a100-40",
    r"(NVIDIA )?A100-SXM4-80GB|NVIDIA A100 80GB PCIe": "a100-80",
    r"NVIDIA L40S": "l40s",
    r"NVIDIA H100 PCIe": "h100-pcie",
    r"NVIDIA H100 80GB HBM3": "h100",
    r"NVIDIA H200": "h200",
    r"NVIDIA B200": "b200",
    r"AMD Instinct MI300X( OAM)?": "mi300x",
    r"AMD Instinct MI325X( OAM)?": "mi325x",
}


class StepTotals(NamedTuple):
    """One step over all ranks."""

    loss: float  # nats per scored token of the global batch; as it is, also when not finite
    counts_LE: Tensor  # float64: tokens that chose each expert; no rows in a dense network
    stop: bool  # whether any rank asks to stop


class Interval:
    """Sums over the steps since `start`: `add_micro` per micro-batch, `finish_step` per step, `values` per log line.

    `clock` is the one that the loop takes its phases with; the interval reads and resets it.
    """

    def __init__(self, cfg: config.Config, groups: Groups, sources: Sequence[str]) -> None:
        """`sources` names every source that rows may come from, in the same order on every rank."""
        self.cfg, self.groups, self.sources = cfg, groups, list(sources)
        self.clock = Clock(groups.device)
        self.experts = cfg.model.num_local_experts
        self.layers = cfg.model.num_hidden_layers if self.experts else 0
        self.flops_per_token = sum(costs.train_flops(cfg.model, cfg.data.seq_len).values())
        self.peak_flops = peak_flops(groups.device, cfg.train.dtype)
        self._sums: Tensor | None = None  # of the step under way, this rank
        self._rows: Counter[str] = Counter()
        self.start()

    def start(self) -> None:
        """Forget the interval that was logged and begin the next."""
        self.began = time.perf_counter()
        self.clock.reset()
        self.steps = self.forgotten = 0
        self.scored = 0.0
        self.totals: Tensor | None = None
        self._latest: tuple[Tensor, float] | None = None  # the last step: sums over all ranks, scored tokens

    def add_micro(self, losses: Losses, batch: Batch) -> None:
        """Add one micro-batch of this rank."""
        scalars = torch.stack([losses.cross_entropy_sum, losses.z_loss_sum, losses.dropped_L.sum()])
        parts = (scalars, losses.entropy_sum_L, losses.counts_LE.flatten())
        sums = torch.cat([part.detach().double() for part in parts])
        self._sums = sums if self._sums is None else self._sums + sums
        self._rows.update(batch.sources)

    def finish_step(self, scored: float, stop: bool = False) -> StepTotals:
        """Sum the step over all ranks. Collective, the only one of a step here.

        Args:
            scored: tokens of the global batch that count in the loss.
            stop: whether this rank wants to stop; the answer says whether any does, and is the same on every rank.
        """
        assert self._sums is not None, "finish_step follows add_micro"
        rows = [float(self._rows[source]) for source in self.sources]
        sums = torch.cat([self._sums, self._sums.new_tensor([*rows, float(stop)])])
        self._sums, self._rows = None, Counter()
        # Ranks that share a tensor lane read the same tokens; the wish to stop may be any rank's.
        totals = self.groups.total(sums) / self.groups.place.tp_size
        self._keep()
        self._latest = (totals, scored)
        nats, stops = totals[[0, -1]].tolist()
        return StepTotals(
            nats / max(scored, 1), self._split(totals)["counts"].view(-1, max(1, self.experts)), stops > 0
        )

    def forget_step(self) -> None:
        """Leave the step that `finish_step` has just summed out of the interval: it was skipped."""
        assert self._latest is not None, "forget_step follows finish_step"
        self._latest = None
        self.forgotten += 1

    def values(self, step: int) -> dict[str, Any]:
        """The interval's facts for Metrics.train; `step` is the last one in it.

        Means over the steps that were not forgotten: `loss` in nats per scored token, `z_loss` per token (summed over
        layers), `router_entropy` in nats per token of each layer and `router_entropy_share` (mean over layers / log E),
        `dropped_fraction` of the token-to-expert assignments, `expert_load` as share of the tokens that each expert of
        each layer got, its spread (log_lines.load_spread), `dead_experts`: experts of all layers without any token, and
        `data_mixture` as share of the rows from each source.

        Speed leaves out validation and checkpoints. `model_flops_per_second` is tokens a second x FLOPs per token
        (costs.train_flops at data.seq_len: 6 for each active weight of a matmul and 6 H C T a layer for causal
        attention over whole rows), over all processes; `mfu` divides it by processes x the bf16 peak of the device
        (costs.GPUS). It is None on a CPU, on a device without a data sheet there, and for activations in float32.

        `step_seconds` and `phase_seconds` ("other": what no phase took) are seconds a step, skipped ones included, of
        this rank. `memory_gib` is the peak since the process started.
        """
        self._keep()
        phases = self.clock.seconds()  # on a GPU this waits for the work that the time is about
        wall = time.perf_counter() - self.began
        speed = self.steps * self.cfg.train.global_batch_tokens / (wall - phases["validation"] - phases["checkpoint"])
        per_step = {name: seconds / max(1, self.steps + self.forgotten) for name, seconds in phases.items()}
        step_seconds = wall / max(1, self.steps + self.forgotten)
        flops, world = speed * self.flops_per_token, self.groups.world
        return {
            "tokens": step * self.cfg.train.global_batch_tokens,
            **(self._means() if self.totals is not None else {"loss": None}),
            "tokens_per_second": speed,
            "tokens_per_second_per_gpu": speed / world,
            "model_flops_per_second": flops,
            "mfu": flops / (world * self.peak_flops) if self.peak_flops else None,
            "step_seconds": step_seconds,
            "phase_seconds": per_step | {"other": max(0.0, step_seconds - sum(per_step.values()))},
            "memory_gib": memory_gib(self.groups.device),
        }

    def _keep(self) -> None:
        """Add the last step, now that nobody forgot it."""
        if self._latest is not None:
            totals, scored = self._latest
            self.totals = totals if self.totals is None else self.totals + totals
            self.scored += scored
            self.steps += 1
            self._latest = None

    def _split(self, totals: Tensor) -> dict[str, Tensor]:
        """The sums by meaning, all 1-D."""
        sizes = {"scalars": 3, "entropy": self.layers, "counts": self.layers * self.experts}
        sizes |= {"rows": len(self.sources), "stop": 1}
        return dict(zip(sizes, totals.split(list(sizes.values())), strict=True))

    def _means(self) -> dict[str, Any]:
        """What was learnt of the model and the data."""
        assert self.totals is not None
        model, tokens = self.cfg.model, self.steps * self.cfg.train.global_batch_tokens
        parts = {name: part.tolist() for name, part in self._split(self.totals).items()}
        nats, z_loss, dropped = parts["scalars"]
        rows = sum(parts["rows"])
        means: dict[str, Any] = {
            "loss": nats / max(self.scored, 1),
            "data_mixture": {name: n / rows for name, n in zip(self.sources, parts["rows"], strict=True)}
            if rows
            else None,
        }
        if not self.layers:
            return means
        counts = [
            parts["counts"][first : first + self.experts] for first in range(0, len(parts["counts"]), self.experts)
        ]
        entropy = [nats / tokens for nats in parts["entropy"]]
        evenly = torch.tensor(float(self.experts)).log().item()
        return means | {
            "z_loss": z_loss / tokens,
            "dropped_fraction": dropped / (tokens * model.num_experts_per_tok * self.layers),
            "router_entropy": entropy,
            "router_entropy_share": sum(entropy) / len(entropy) / evenly if evenly else None,
            "expert_load": [[count / max(1.0, sum(layer)) for count in layer] for layer in counts],
            **load_spread(counts),
            "dead_experts": sum(count == 0 for layer in counts for count in layer),
        }


def peak_flops(device: torch.device, dtype: str) -> float | None:
    """What the data sheet promises of dense bf16 matmuls, FLOPs a second; None where that is no measure or unknown.

    `dtype` is that of the activations (train.dtype).
    """
    if device.type != "cuda" or dtype != "bfloat16":
        return None
    gpu = gpu_named(torch.cuda.get_device_name(device))
    return gpu.tflops * 1e12 if gpu else None


def gpu_named(name: str) -> costs.Gpu | None:
    """The data sheet of a device by the name that its driver gives it; None where it is not known for certain."""
    for pattern, key in DEVICE_NAMES.items():
        if re.fullmatch(pattern, name):
            return costs.GPUS[key]
    return None


def memory_gib(device: torch.device) -> dict[str, float]:
    """Peaks since the process started: "host" memory of it; "device" for tensors and "device_reserved" on a GPU."""
    memory = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20}  # Linux counts in KiB
    if device.type == "cuda":
        memory["device"] = torch.cuda.max_memory_allocated(device) / GIB
        memory["device_reserved"] = torch.cuda.max_memory_reserved(device) / GIB
    return memory


def progress(step: int, cfg: config.Config, groups: Groups) -> tqdm:
    """A progress bar with ETA that stands at `step`; seen on the main rank of a terminal only."""
    return tqdm(
        desc=cfg.run.stage,
        total=cfg.total_steps,
        initial=step,
        unit="step",
        disable=None if groups.is_main else True,
        dynamic_ncols=True,
    )
