"""Which tokens meet which experts, drop-and-pad or dropless, and the way to experts on other ranks and back.

Shapes: T tokens of this rank, K experts per token, E experts over all ranks, D model width, R rows of the local
experts.
"""

import math
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from kernels.permute import Plan, invert, permute, plan_capacity, plan_dropless, reorder, unpermute
from kernels.router import Routing
from mm_train.timing import Clock, phase


@dataclass
class Dispatched:
    """What `combine` needs to undo a dispatch."""

    plan: Plan
    sent: list[int]  # rows this rank sent to each rank
    received: list[int]
    by_expert: Tensor  # received rows -> rows sorted by local expert
    inverse: Tensor


class Dispatcher:
    """Gives slots their rows, and moves token rows to experts on other ranks and back.

    `capacity_factor` None means dropless; otherwise every expert takes ceil(factor * T * K / E) rows from every rank,
    earlier tokens first. `group` is the expert-parallel process group (None: all experts are here). `clock`, where one
    is set, is told of the time in collectives.
    """

    clock: Clock | None = None

    def __init__(
        self, num_experts: int, capacity_factor: float | None = None, group: dist.ProcessGroup | None = None
    ) -> None:
        self.num_experts = num_experts
        self.capacity_factor = capacity_factor
        self.group = group
        self.ranks = 1 if group is None else dist.get_world_size(group)

    def plan(self, routing: Routing, dropless: bool) -> tuple[Plan, Tensor]:
        """Which row each slot gets, and every expert's rows, padding included; `dropless` overrules a capacity."""
        ids_TK, counts_E = routing.ids_TK, routing.counts_E
        if dropless or self.capacity_factor is None:
            return plan_dropless(ids_TK, counts_E, routing.places), counts_E
        capacity = math.ceil(self.capacity_factor * ids_TK.numel() / self.num_experts)
        return plan_capacity(ids_TK, counts_E, capacity, routing.places), torch.full_like(counts_E, capacity)

    def dispatch(self, x_TD: Tensor, plan: Plan, sent_E: Tensor) -> tuple[Tensor, Tensor, Dispatched]:
        """Returns x_RD sorted by local expert, the local experts' row counts, and the record for `combine`."""
        x_RD = permute(x_TD, plan)
        received_E = sent_E  # [source rank, local expert], flattened; with a capacity all counts are equal
        if plan.full:
            received_E = torch.empty_like(sent_E)
            with phase(self.clock, "all_to_all"):
                dist.all_to_all_single(received_E, sent_E, group=self.group)
        received_SE, sent_SE = received_E.view(self.ranks, -1), sent_E.view(self.ranks, -1)
        if plan.full:
            sent, received = sent_SE.sum(1).tolist(), received_SE.sum(1).tolist()
        else:  # known without waiting for the device
            sent = received = [len(plan.slot_R) // self.ranks] * self.ranks
        x_RD = _AllToAll.apply(x_RD, received, sent, self.group, self.clock)
        # Rows arrive by source rank, then expert; the grouped matmul wants them by expert.
        expert_R = torch.arange(received_SE.shape[1], device=x_TD.device).repeat(self.ranks)
        expert_R = expert_R.repeat_interleave(received_E, output_size=sum(received))
        by_expert = torch.sort(expert_R, stable=True).indices
        inverse = invert(by_expert)
        record = Dispatched(plan, sent, received, by_expert, inverse)
        return reorder(x_RD, by_expert, inverse), received_SE.sum(0), record

    def combine(self, y_RD: Tensor, weights_TK: Tensor, record: Dispatched) -> Tensor:
        """Weighted sum of each token's expert outputs: y_RD -> y_TD."""
        y_RD = reorder(y_RD, record.inverse, record.by_expert)
        y_RD = _AllToAll.apply(y_RD, record.sent, record.received, self.group, self.clock)
        return unpermute(y_RD, weights_TK, record.plan)


class _AllToAll(torch.autograd.Function):
    """Uneven all-to-all of rows; the gradient takes the opposite way."""

    @staticmethod
    def forward(ctx, x_RD, received, sent, group, clock):
        ctx.received, ctx.sent, ctx.group, ctx.clock = received, sent, group, clock
        out_RD = x_RD.new_empty(sum(received), x_RD.shape[1])
        with phase(clock, "all_to_all"):
            dist.all_to_all_single(out_RD, x_RD.contiguous(), received, sent, group=group)
        return out_RD

    @staticmethod
    def backward(ctx, dout_RD):
        return _AllToAll.apply(dout_RD, ctx.sent, ctx.received, ctx.group, ctx.clock), None, None, None, None
