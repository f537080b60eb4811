"""Gradients and optimizer steps on one process in plain PyTorch, and the interface shared with DeepSpeed's engine."""

from collections.abc import Callable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn

from mm_train import config, inventory
from mm_train.data import Batch
from mm_train.inventory import KINDS
from mm_train.model import Losses, MobileMoE
from mm_train.muon import MuonAdamW, Whole, matrices_of
from mm_train.optim import make_optimizer, parameter_groups
from mm_train.optim_groups import group_of
from mm_train.sharding import ALONE, Place

ReadRange = Callable[[str, int, int], Tensor]  # kind, start, stop -> those elements of the local tensor, 1-D float32


class Fragment(NamedTuple):
    """Elements start..stop of the part of a parameter that a rank holds, row by row.

    The fragments of all ranks cover every element of every parameter of the network exactly once: what a checkpoint
    saves and what a global norm adds up.
    """

    name: str
    start: int
    stop: int


class Engine(Protocol):
    """What the training loop and the checkpoint need of whoever holds gradients and optimizer state."""

    model: MobileMoE
    loss_scale: float  # factor on the loss that undoes the engine's own averaging over ranks and micro-steps

    def forward(self, batch: Batch) -> Losses: ...

    def backward(self, loss: Tensor) -> None: ...

    def fragments(self) -> list[Fragment]:
        """What this rank answers for; the same from construction on."""
        ...

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        """Its KINDS (mm_train.optim_groups) -> float32 master weights and moments: live 1-D views, not copies."""
        ...

    def gradient(self, fragment: Fragment) -> Tensor | None:
        """The fragment's gradient, 1-D, summed over ranks and micro-steps; None where the loss does not depend on it.

        Between the backward pass of the last micro-step and `step` or `discard`.
        """
        ...

    def scale_gradients(self, factor: float) -> None:
        """Multiply all gradients, at the same moment."""
        ...

    def step(self, learning_rate: float) -> None:
        """Update with the gradients as they are, and clear them."""
        ...

    def discard(self) -> None:
        """Clear the gradients without an update."""
        ...

    def restore(self, name: str, read: ReadRange) -> None:
        """Overwrite a parameter and what this rank keeps of its moments."""
        ...

    def restore_step(self, step: int) -> None:
        """Set how many optimizer steps the moments have seen."""
        ...


class WholeState:
    """Weights, gradients and moments whole on this rank: those of `parameters`, in `adam`."""

    parameters: dict[str, nn.Parameter]
    adam: torch.optim.AdamW

    def lay_out_matrices(self, model: MobileMoE, optim: config.Optim, place: Place) -> None:
        """Tell Muon, if it is in use, what the parameters are made of."""
        if isinstance(self.adam, MuonAdamW):
            for entry in inventory.tensors(model.config):
                if group_of(entry.part, optim).algorithm == "muon":
                    parameter, matrices = self.parameters[entry.name], matrices_of(entry, place, optim)
                    self.adam.lay_out(parameter, [Whole(0, parameter.numel() // matrices.size, matrices)])

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        parameter = self.parameters[fragment.name]
        state = self.adam.state[parameter]
        tensors = {"weight": parameter.detach()} | {key: state[key] for key in KINDS[1:] if key in state}
        return {kind: tensor.view(-1)[fragment.start : fragment.stop] for kind, tensor in tensors.items()}

    def gradient(self, fragment: Fragment) -> Tensor | None:
        gradient = self.parameters[fragment.name].grad
        return None if gradient is None else gradient.reshape(-1)[fragment.start : fragment.stop]

    def scale_gradients(self, factor: float) -> None:
        torch._foreach_mul_([p.grad for p in self.parameters.values() if p.grad is not None], factor)

    @torch.no_grad()
    def restore(self, name: str, read: ReadRange) -> None:
        whole = Fragment(name, 0, self.parameters[name].numel())
        for kind, tensor in self.state(whole).items():
            tensor.copy_(read(kind, whole.start, whole.stop))


class PlainEngine(WholeState):
    """Gradients accumulate in .grad, torch's optimizer steps."""

    loss_scale = 1.0

    def __init__(self, model: MobileMoE, optim: config.Optim) -> None:
        self.model = model
        self.parameters = dict(model.named_parameters())
        self.adam = make_optimizer(parameter_groups(model, optim), optim, model.compute_dtype)
        materialise_moments(self.adam)
        self.lay_out_matrices(model, optim, ALONE)

    def forward(self, batch: Batch) -> Losses:
        return self.model(batch.tokens_BT, batch.labels_BT, batch.document_BT, batch.lengths)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def fragments(self) -> list[Fragment]:
        return [Fragment(name, 0, parameter.numel()) for name, parameter in self.parameters.items()]

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.adam, learning_rate)
        self.adam.step()
        self.adam.zero_grad()

    def discard(self) -> None:
        self.adam.zero_grad()

    def restore_step(self, step: int) -> None:
        set_step(self.adam, step)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Same rate for every group, but for the ratio that the config wants for Muon's."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_ratio", 1.0)


def materialise_moments(optimizer: torch.optim.Optimizer) -> None:
    """Create the optimizer's state now, as its first step would (zeros): a checkpoint can then be loaded into it."""
    for group in optimizer.param_groups:
        muon = group["algorithm"] == "muon"
        for parameter in group["params"]:
            moments = {key: torch.zeros_like(parameter) for key in (KINDS[1:2] if muon else KINDS[1:])}
            # AdamW's count of steps, where a fused one wants it
            step = {} if muon else {"step": torch.zeros((), device=parameter.device)}
            optimizer.state[parameter] = step | moments


def set_step(optimizer: torch.optim.Optimizer, step: int) -> None:
    """Steps that the moments have seen: AdamW's bias correction depends on it."""
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].fill_(step)
