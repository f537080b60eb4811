"""Parameter groups, learning-rate schedules, gradient norms and clipping, the expert-bias update."""

import math
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mm_train import config, inventory
from mm_train.cli import UserError
from mm_train.muon import MuonAdamW
from mm_train.optim_groups import Group, group_of

if TYPE_CHECKING:
    from mm_train.engine import Engine
    from mm_train.model import MobileMoE
    from mm_train.parallel.groups import Groups


def parameter_groups(model: "MobileMoE", optim: config.Optim) -> list[dict]:
    """Parameters that are treated alike (mm_train.optim_groups), in the model's order. Names are for DeepSpeed."""
    entries = {entry.name: entry for entry in inventory.tensors(model.config)}
    found: dict[Group, dict] = {}
    for name, parameter in model.named_parameters():
        group = group_of(entries[name].part, optim)
        ratio = optim.muon_lr_ratio if group.algorithm == "muon" else 1.0
        values = asdict(group) | {"name": group.name, "lr_ratio": ratio, "params": []}
        found.setdefault(group, values)["params"].append(parameter)
    return list(found.values())


def make_optimizer(groups: list[dict], optim: config.Optim, dtype: torch.dtype = torch.float32) -> torch.optim.AdamW:
    """The same optimizer whether DeepSpeed shards it or not. `dtype`: of the matrix products that Muon computes."""
    if optim.name == "muon":
        return MuonAdamW(groups, optim, dtype)
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(step: int, total_steps: int, optim: config.Optim) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to `lr`, then the schedule down to lr * min_lr_ratio.

    wsd stays at `lr` until the last steps. 1-sqrt is the decay that Haegele et al. 2024 (arXiv 2405.18392) found best.
    """
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    begin = optim.decay_from(total_steps) if optim.schedule == "wsd" else optim.warmup_steps
    done = max(0, step - begin) / max(1, total_steps - begin)
    falls = {
        "cosine": 0.5 * (1 + math.cos(math.pi * done)),
        "linear": 1 - done,
        "constant": 1.0,
        "wsd": 1 - (math.sqrt(done) if optim.decay_shape == "1-sqrt" else done),
    }
    floor = optim.lr * optim.min_lr_ratio if optim.schedule != "constant" else 0.0
    return floor + (optim.lr - floor) * falls[optim.schedule]


def schedule_change(step: int, there: config.Config, here: config.Config, folder: Path) -> str | None:
    """How the learning rate jumps when a run goes on from the checkpoint `folder` with another schedule, in words.

    `step` steps are done, `there` is the config of then; None when nothing jumps. A wsd run can be made longer (or
    shorter) up to its decay. Raises UserError after that.
    """
    began = there.decay_from
    if began is not None and step > began and there.total_steps != here.total_steps:
        raise UserError(
            f"checkpoint {folder} lies in the decay of its learning rate, which began after step {began} of"
            f" {there.total_steps}: another train.tokens ({there.train.tokens} there, {here.train.tokens} here) can"
            f" go on from a checkpoint up to step {began} only (resume_from); init_from starts a new stage from its"
            " weights"
        )
    before, now = (learning_rate(step, cfg.total_steps, cfg.optim) for cfg in (there, here))
    if math.isclose(before, now, rel_tol=1e-6):
        return None
    return f"by {folder} the next step would have had the rate {before:.3g}; it has {now:.3g}"


@torch.no_grad()
def gradient_norms(engine: "Engine", groups: "Groups") -> dict[str, float]:
    """Norm of the gradient of each part of the network (mm_train.inventory) and of all: "total". Collective.

    Every rank adds up what it answers for, so sharded experts and replicated tensors count once. In float64: in float32
    the norm of half a million values is off by some 1e-5, and clipping makes that visible.
    """
    parts = {entry.name: entry.part for entry in inventory.tensors(engine.model.config)}
    names = list(dict.fromkeys(parts.values()))
    squares = torch.zeros(len(names), dtype=torch.float64, device=groups.device)
    for fragment in engine.fragments():
        gradient = engine.gradient(fragment)
        if gradient is not None:
            norm = torch.linalg.vector_norm(gradient, dtype=torch.float64)
            squares[names.index(parts[fragment.name])] += norm * norm
    groups.total(squares)
    norms = dict(zip(names, squares.sqrt().tolist(), strict=True))
    return norms | {"total": math.sqrt(sum(norm * norm for norm in norms.values()))}


def clip(engine: "Engine", norm: float, limit: float) -> None:
    """Scale all gradients so that their norm, now `norm`, does not exceed `limit` (0: no limit)."""
    factor = float(limit / (torch.tensor(norm, dtype=torch.float32) + 1e-6))  # torch.nn.utils.clip_grads_with_norm_
    if limit and factor < 1:
        engine.scale_gradients(factor)


@torch.no_grad()
def update_expert_bias(biases: Iterable[Tensor], counts_LE: Tensor, rate: float) -> None:
    """expert_bias += rate * sign(mean load - load), layer by layer, in place (auxiliary-loss-free balancing).

    `counts_LE` are tokens per expert of the whole global batch.
    """
    load_LE = counts_LE.float()
    for bias_E, load_E in zip(biases, load_LE, strict=True):
        bias_E += rate * torch.sign(load_E.mean() - load_E)
