"""The ways of running one MoE layer that mm_train.bench_layer compares, all with the same weights."""

import copy
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.router import route
from mm_train import config
from mm_train.bench_train_worker import glm4_moe
from mm_train.moe import MoELayer

CAPACITY = 1.5  # of the paper's pre-training
WEIGHTS = ("router", "experts.gate_up", "experts.down", "shared.gate", "shared.up", "shared.down")


class Way(nn.Module):
    """A layer to be timed: x_TD -> y_TD, in the dtype of x."""

    compared = True  # it has to compute what the first way does

    def gradients(self) -> list[Tensor]:
        """Of WEIGHTS, in that order and in the layout of MoELayer."""
        raise NotImplementedError


class Ours(Way):
    """The layer as it is trained."""

    def __init__(self, layer: MoELayer, capacity_factor: float | None = None) -> None:
        super().__init__()
        self.layer = copy.deepcopy(layer)
        self.layer.dispatcher.capacity_factor = capacity_factor
        self.compared = capacity_factor is None

    def forward(self, x_TD: Tensor) -> Tensor:
        y_TD, _statistics = self.layer(x_TD)
        return y_TD

    def gradients(self) -> list[Tensor]:
        return [_gradient(parameter) for parameter in self.layer.parameters()]


class ExpertLoop(Way):
    """As people write it: each expert in turn asks which tokens chose it, and adds its output to theirs.

    Every expert has weights of its own, so that autograd makes no gradient of all experts for each of them.
    `in_float32`: whatever x is, instead of autocast.
    """

    def __init__(self, layer: MoELayer, in_float32: bool = False) -> None:
        super().__init__()
        self.model, self.in_float32 = layer.model, in_float32
        self.router = copy.deepcopy(layer.router)
        assert layer.shared_expert is not None  # the command refuses what transformers' layer cannot be
        self.shared = nn.ParameterList(parameter.detach().clone() for parameter in layer.shared_expert.parameters())
        self.gate_up, self.down = (
            nn.ParameterList(weight.T.contiguous() for weight in stacked.detach())
            for stacked in (layer.experts.gate_up_proj, layer.experts.down_proj)
        )

    def forward(self, x_TD: Tensor) -> Tensor:
        if self.in_float32:
            return self._loop(x_TD.float()).to(x_TD.dtype)
        with _autocast(x_TD):
            return self._loop(x_TD)

    def _loop(self, x_TD: Tensor) -> Tensor:
        shape = self.model
        with _autocast(x_TD, enabled=False):
            logits_TE = self.router(x_TD)
            no_bias_E = torch.zeros_like(logits_TE[0])
            ids_TK, weights_TK = route(
                logits_TE, no_bias_E, shape.num_experts_per_tok, shape.routed_scaling_factor, shape.norm_topk_prob
            )
        y_TD = torch.zeros_like(x_TD)
        for expert, (gate_up, down) in enumerate(zip(self.gate_up, self.down, strict=True)):
            token, k = torch.where(ids_TK == expert)
            gate, up = F.linear(x_TD[token], gate_up).chunk(2, dim=-1)
            out = F.linear(F.silu(gate) * up, down) * weights_TK[token, k, None]
            y_TD.index_add_(0, token, out.to(y_TD.dtype))
        gate_proj, up_proj, down_proj = self.shared
        return y_TD + F.linear(F.silu(F.linear(x_TD, gate_proj)) * F.linear(x_TD, up_proj), down_proj)

    def gradients(self) -> list[Tensor]:
        stacked = [torch.stack([_gradient(p).T for p in weights]) for weights in (self.gate_up, self.down)]
        return [_gradient(self.router.weight), *stacked, *map(_gradient, self.shared)]


class Transformers(Way):
    """transformers' Glm4MoeMoE; `experts` is its experts_implementation."""

    def __init__(self, layer: MoELayer, experts: str) -> None:
        super().__init__()
        whole: Any = glm4_moe(replace(layer.model, num_hidden_layers=1, vocab_size=32), experts)
        self.layer = whole.model.layers[0].mlp
        shared = self.layer.shared_experts
        self.weights = [self.layer.gate.weight, self.layer.experts.gate_up_proj, self.layer.experts.down_proj]
        self.weights += [linear.weight for linear in (shared.gate_proj, shared.up_proj, shared.down_proj)]
        with torch.no_grad():
            for theirs, ours in zip(self.weights, layer.parameters(), strict=True):
                theirs.copy_(_transposed(ours))
        self.layer.gate.forward = _without_autocast(self.layer.gate.forward)

    def forward(self, x_TD: Tensor) -> Tensor:
        with _autocast(x_TD):
            return self.layer(x_TD)

    def gradients(self) -> list[Tensor]:
        return [_transposed(_gradient(weight)) for weight in self.weights]


def ways(model: config.Model, dtype: torch.dtype, device: torch.device) -> dict[str, Way]:
    """What is compared, by name; the first is what the others are measured by."""
    torch.manual_seed(0)
    layer = MoELayer(model)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=model.initializer_range)
    found: dict[str, Way] = {
        "this layer, dropless": Ours(layer),
        f"this layer, drop-and-pad at {CAPACITY}": Ours(layer, CAPACITY),
        "Python loop over experts": ExpertLoop(layer),
        "Python loop, in float32": ExpertLoop(layer, in_float32=True),
        "transformers, experts grouped_mm": Transformers(layer, "grouped_mm"),
        "transformers, experts eager": Transformers(layer, "eager"),
    }
    if dtype == torch.float32:
        del found["Python loop, in float32"]
    return {name: way.to(device).train() for name, way in found.items()}


def _gradient(parameter: Tensor) -> Tensor:
    assert parameter.grad is not None
    return parameter.grad


def _transposed(weight: Tensor) -> Tensor:
    """Between [E, in, out] and [E, out, in]; other weights lie alike."""
    return weight.transpose(1, 2) if weight.dim() == 3 else weight


def _autocast(x: Tensor, enabled: bool = True) -> torch.autocast:
    return torch.autocast(x.device.type, torch.bfloat16, enabled=enabled and x.dtype == torch.bfloat16)


def _without_autocast(forward: Any) -> Any:
    """A router in float32: in bfloat16 it would choose other experts."""

    def exact(hidden_states: Tensor) -> Any:
        with _autocast(hidden_states, enabled=False):
            return forward(hidden_states)

    return exact
