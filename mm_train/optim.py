"""AdamW groups, learning-rate schedules, gradient norms and clipping, the expert-bias update."""

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from mm_train import config, inventory

if TYPE_CHECKING:
    from mm_train.engine import Engine
    from mm_train.parallel.groups import Groups


def parameter_groups(model: nn.Module, optim: config.Optim) -> list[dict]:
    """Two AdamW groups: matrices with weight decay, vectors (norms) without. Names serve DeepSpeed's regrouping."""
    matrices = [p for p in model.parameters() if p.ndim >= 2]
    vectors = [p for p in model.parameters() if p.ndim < 2]
    return [
        {"params": matrices, "weight_decay": optim.weight_decay, "name": "matrices"},
        {"params": vectors, "weight_decay": 0.0, "name": "vectors"},
    ]


def adamw(groups: list[dict], optim: config.Optim) -> torch.optim.AdamW:
    """The same optimizer whether DeepSpeed shards it or not."""
    return torch.optim.AdamW(groups, lr=optim.lr, betas=optim.betas, eps=optim.eps, fused=True)


def learning_rate(step: int, total_steps: int, optim: config.Optim) -> float:
    """Rate of optimizer step `step` (0-based): linear warm-up to `lr`, then the schedule down to lr * min_lr_ratio."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    done = (step - optim.warmup_steps) / max(1, total_steps - optim.warmup_steps)
    falls = {"cosine": 0.5 * (1 + math.cos(math.pi * done)), "linear": 1 - done, "constant": 1.0}
    floor = optim.lr * optim.min_lr_ratio if optim.schedule != "constant" else 0.0
    return floor + (optim.lr - floor) * falls[optim.schedule]


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
