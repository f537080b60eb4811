"""The mixture-of-experts layer: route -> dispatch -> experts -> combine, plus the shared expert.

Shapes: T tokens, D model width, E experts, K experts per token, F expert hidden width. Source: arXiv 2605.27358;
parameter names are those of the released checkpoints (`feed_forward.*`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import experts
from kernels.router import route, z_loss_sum
from mm_train import config
from mm_train.dispatch import Dispatcher
from mm_train.quant import FakeQuant, Linear


class RouterStats(NamedTuple):
    """Facts of one layer's routing over this rank's tokens; sums, so that they add up over ranks and micro-steps."""

    counts_E: Tensor  # int64: tokens that chose each expert, before any drop
    dropped: Tensor  # int64: slots that found no room
    z_loss_sum: Tensor  # float32, differentiable


class Router(nn.Module):
    """Linear gate in float32, whatever the activations are."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(model.num_local_experts, model.hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """logits_TE."""
        return F.linear(x_TD.float(), self.weight.float())


class Experts(nn.Module):
    """Weights of the routed experts, [E, in, out]; under expert parallelism the slice that lives on this rank."""

    fake_quant: FakeQuant | None = None

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        num, width, hidden = model.num_local_experts, model.hidden_size, model.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, width, 2 * hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """y_RD for rows sorted by expert."""
        if self.fake_quant is None:
            return experts(x_RD, self.gate_up_proj, self.down_proj, counts_E)
        return self.fake_quant.experts(x_RD, self.gate_up_proj, self.down_proj, counts_E)


class SharedExpert(nn.Module):
    """The SwiGLU MLP that every token passes."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.gate_proj = Linear(model.hidden_size, model.intermediate_size_mlp)
        self.up_proj = Linear(model.hidden_size, model.intermediate_size_mlp)
        self.down_proj = Linear(model.intermediate_size_mlp, model.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class MoELayer(nn.Module):
    """Routed experts plus shared expert. Drops tokens only in training and only if its dispatcher has a capacity."""

    expert_bias: Tensor

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.model = model
        self.router = Router(model)
        self.experts = Experts(model)
        self.shared_expert = SharedExpert(model)
        self.register_buffer("expert_bias", torch.zeros(model.num_local_experts))
        self.dispatcher = Dispatcher(model.num_local_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, RouterStats]:
        logits_TE = self.router(x_TD)
        ids_TK, weights_TK = route(
            logits_TE,
            self.expert_bias.float(),
            self.model.num_experts_per_tok,
            self.model.routed_scaling_factor,
            self.model.norm_topk_prob,
        )
        counts_E = torch.bincount(ids_TK.flatten(), minlength=self.model.num_local_experts)
        x_RD, local_counts, record = self.dispatcher.dispatch(x_TD, ids_TK, counts_E, dropless=not self.training)
        y_TD = self.dispatcher.combine(self.experts(x_RD, local_counts), weights_TK, record)
        dropped = (record.plan.row_TK == record.plan.slot_R.numel()).sum()
        return y_TD + self.shared_expert(x_TD), RouterStats(counts_E, dropped, z_loss_sum(logits_TE))
