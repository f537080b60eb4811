"""Gradients and optimizer steps on one process in plain PyTorch, and the interface shared with DeepSpeed's engine."""

from typing import Protocol

import torch
from torch import Tensor, nn

from mm_train import config
from mm_train.data import Batch
from mm_train.model import Losses, MobileMoE
from mm_train.optim import adamw, parameter_groups

MOMENTS = ("exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """What the training loop and the checkpoint need of whoever holds gradients and optimizer state."""

    model: MobileMoE
    loss_scale: float  # factor on the loss that undoes the engine's own averaging over ranks and micro-steps

    def forward(self, batch: Batch) -> Losses: ...

    def backward(self, loss: Tensor) -> None: ...

    def step(self, learning_rate: float) -> Tensor | float:
        """Clip, update, clear gradients. Returns the global gradient norm before clipping."""
        ...

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        """Adam's first and second moment, whole, float32. Collective: every rank calls it for the same parameter."""
        ...

    def restore(self, parameter: nn.Parameter, value: Tensor, moments: dict[str, Tensor]) -> None:
        """Overwrite a parameter and its moments."""
        ...

    def restore_step(self, step: int) -> None:
        """Set how many optimizer steps the moments have seen."""
        ...


class PlainEngine:
    """Gradients accumulate in .grad, torch's AdamW steps."""

    loss_scale = 1.0

    def __init__(self, model: MobileMoE, optim: config.Optim) -> None:
        self.model = model
        self.clip = optim.clip_grad_norm
        self.optimizer = adamw(parameter_groups(model, optim), optim)
        materialise_moments(self.optimizer)

    def forward(self, batch: Batch) -> Losses:
        return self.model(batch.tokens_BT, batch.labels_BT, batch.document_BT)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self, learning_rate: float) -> Tensor:
        set_learning_rate(self.optimizer, learning_rate)
        parameters = list(self.model.parameters())
        # In float64, as DeepSpeed does it: in float32 the norm of half a million values is off by some 1e-5.
        norms = [torch.linalg.vector_norm(p.grad, dtype=torch.float64) for p in parameters if p.grad is not None]
        norm = torch.linalg.vector_norm(torch.stack(norms)).float()
        if self.clip:
            nn.utils.clip_grads_with_norm_(parameters, self.clip, norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return norm

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        return {key: self.optimizer.state[parameter][key] for key in MOMENTS}

    def restore(self, parameter: nn.Parameter, value: Tensor, moments: dict[str, Tensor]) -> None:
        parameter.data.copy_(value)
        for key, moment in moments.items():
            self.optimizer.state[parameter][key].copy_(moment)

    def restore_step(self, step: int) -> None:
        set_step(self.optimizer, step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Same rate for every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate


def materialise_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create AdamW's state (zeros, step 0) now, as its first step would: a checkpoint can then be loaded into it."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            optimizer.state[parameter] = {
                "step": torch.zeros((), device=parameter.device),  # where a fused AdamW wants it
                **{key: torch.zeros_like(parameter) for key in MOMENTS},
            }


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Steps that the moments have seen: AdamW's bias correction depends on it."""
    for state in optimizer.state.values():
        state["step"].fill_(step)
