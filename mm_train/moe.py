"""The mixture-of-experts layer: route -> dispatch -> experts -> combine, plus the shared expert.

Shapes: T tokens, D model width, E experts, K experts per token, F expert hidden width. Source: arXiv 2605.27358;
parameter names are those of the released checkpoints (`feed_forward.*`).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.experts import experts, experts_of_few_tokens, mixture
from kernels.linear import FEW_ROWS, better_in_float32
from kernels.permute import Plan
from kernels.router import route, route_and_count
from mm_train import config
from mm_train.dispatch import Dispatcher
from mm_train.quant import FakeQuant, Linear


class RouterStats(NamedTuple):
    """Facts of one layer's routing over this rank's tokens; sums, so that they add up over ranks and micro-steps."""

    counts_E: Tensor  # int64: tokens that chose each expert, before any drop
    dropped: Tensor  # int64: slots that found no room
    z_loss_sum: Tensor  # float32, differentiable
    entropy_sum: Tensor  # float32: nats over tokens, see kernels.router.entropy_sum


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

    def mixture(self, x_TD: Tensor, weights_TK: Tensor, plan: Plan, counts_E: Tensor) -> Tensor:
        """y_TD, the weighted sum of each token's experts, when all of them are here."""
        if self.fake_quant is None:
            return mixture(x_TD, weights_TK, plan, counts_E, self.gate_up_proj, self.down_proj)
        return self.fake_quant.mixture(x_TD, weights_TK, plan, counts_E, self.gate_up_proj, self.down_proj)


class MLP(nn.Module):
    """The SwiGLU MLP that every token passes: the shared expert, or all of a dense network's feed-forward."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.gate_proj = Linear(model.hidden_size, model.intermediate_size_mlp)
        self.up_proj = Linear(model.hidden_size, model.intermediate_size_mlp)
        self.down_proj = Linear(model.intermediate_size_mlp, model.hidden_size)

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


class MoELayer(nn.Module):
    """Routed experts plus shared expert, if the network has one.

    Drops tokens only in training and only if its dispatcher has a capacity.
    """

    expert_bias: Tensor

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.model = model
        self.router = Router(model)
        self.experts = Experts(model)
        self.shared_expert = MLP(model) if model.intermediate_size_mlp else None
        self.register_buffer("expert_bias", torch.zeros(model.num_local_experts))
        self.dispatcher = Dispatcher(model.num_local_experts)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, RouterStats]:
        if better_in_float32(x_TD):  # once for the whole layer
            y_TD, stats = self(x_TD.float())
            return y_TD.to(x_TD.dtype), stats
        routing = route_and_count(self.router(x_TD), *self.routing_options())
        plan, rows_E = self.dispatcher.plan(routing, dropless=not self.training)
        if self.dispatcher.ranks == 1:
            y_TD = self.experts.mixture(x_TD, routing.weights_TK, plan, rows_E)
        else:
            x_RD, local_counts, record = self.dispatcher.dispatch(x_TD, plan, rows_E)
            y_TD = self.dispatcher.combine(self.experts(x_RD, local_counts), routing.weights_TK, record)
        if self.shared_expert is not None:
            y_TD = y_TD + self.shared_expert(x_TD)
        dropped = rows_E.new_zeros(()) if plan.full else (plan.row_TK == plan.slot_R.numel()).sum()
        return y_TD, RouterStats(routing.counts_E, dropped, routing.z_loss_sum, routing.entropy_sum)

    def infer(self, x_TD: Tensor) -> Tensor:
        """The layer without statistics: y_TD of the next tokens of a generation."""
        slots = x_TD.shape[0] * self.model.num_experts_per_tok
        if x_TD.device.type != "cpu" or slots > FEW_ROWS or self.experts.fake_quant is not None:
            return self(x_TD)[0]
        ids_TK, weights_TK = route(self.router(x_TD), *self.routing_options())
        narrow_TD = x_TD.to(self.experts.down_proj.dtype)  # as kernels.linear would, once for all
        y_TD = experts_of_few_tokens(narrow_TD, ids_TK, weights_TK, self.experts.gate_up_proj, self.experts.down_proj)
        y_TD = y_TD if self.shared_expert is None else y_TD + self.shared_expert(narrow_TD)
        return y_TD.to(x_TD.dtype)

    def routing_options(self) -> tuple[Tensor, int, float, bool, str]:
        """What kernels.router wants beside the logits."""
        shape = self.model
        return (
            self.expert_bias.float(),
            shape.num_experts_per_tok,
            shape.routed_scaling_factor,
            shape.norm_topk_prob,
            shape.scoring_func,
        )
