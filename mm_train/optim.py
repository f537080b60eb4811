"""AdamW groups, learning-rate schedules and the expert-bias update."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from mm_train import config


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
def update_expert_bias(biases: Iterable[Tensor], counts_LE: Tensor, rate: float) -> None:
    """expert_bias += rate * sign(mean load - load), layer by layer, in place (auxiliary-loss-free balancing).

    `counts_LE` are tokens per expert of the whole global batch.
    """
    load_LE = counts_LE.float()
    for bias_E, load_E in zip(biases, load_LE, strict=True):
        bias_E += rate * torch.sign(load_E.mean() - load_E)
