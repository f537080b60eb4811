"""Whole matrices for Muon out of what ranks hold of them: ZeRO cuts them anywhere, tensor parallelism along an axis.

ZeRO lays parameters end to end in a vector and gives every rank a range of it, so most matrices lie whole on one rank.
Ranks that hold parts of the same matrix send each other these parts of the momentum; each makes the same update and
takes its own part of it. Only matrices at the borders travel, at most two for each rank and parameter group.
(deepspeed 0.19.8 has a Muon of its own, which writes the update into the gradients before they are clipped, keeps the
momentum of border matrices on several ranks, and has no AdamW-sized step; it is not used.)
"""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from mm_train import config, inventory
from mm_train.model import MobileMoE
from mm_train.muon import Cut, Gather, MuonAdamW, Whole, matrices_of, pieces
from mm_train.parallel.groups import Groups
from mm_train.sharding import Place

Range = tuple[int, int]  # elements start..stop of a tensor


class Owner(NamedTuple):
    """A rank of a group that holds elements first..first + length of a matrix."""

    rank: int
    first: int
    length: int


def owners_of(which: int, size: int, ranges: list[Range]) -> list[Owner]:
    """Who holds parts of matrix `which` of a tensor, of `size` elements each. `ranges`: of the tensor, rank by rank."""
    found = []
    for rank, (start, stop) in enumerate(ranges):
        low, high = max(start, which * size), min(stop, (which + 1) * size)
        if low < high:
            found.append(Owner(rank, low - which * size, high - low))
    assert sum(owner.length for owner in found) == size, f"ranks hold {ranges}: not all of matrix {which}"
    return found


class Exchange:
    """The matrices at the borders of this rank's vectors, from it and the other ranks that hold parts of them."""

    def __init__(self) -> None:
        self._plans: dict[Tensor, tuple[dist.ProcessGroup, list[list[Owner]]]] = {}

    def plan(self, vector: Tensor, group: dist.ProcessGroup, owners: list[list[Owner]]) -> None:
        """Note who holds each of a vector's cut matrices, in the order of its parts."""
        self._plans[vector] = group, owners

    def __call__(self, vector: Tensor, parts: list[Tensor]) -> list[Tensor]:
        """The whole matrices of `parts`, flat. Every rank that holds parts of them calls this at the same time."""
        group, borders = self._plans[vector]
        me, operations, whole = dist.get_rank(group), [], []
        for owners, part in zip(borders, parts, strict=True):
            matrix = part.new_empty(sum(owner.length for owner in owners))
            whole.append(matrix)
            for rank, first, length in owners:
                room = matrix[first : first + length]
                if rank == me:
                    room.copy_(part)
                else:
                    operations.append(dist.P2POp(dist.isend, part, group=group, group_peer=rank))
                    operations.append(dist.P2POp(dist.irecv, room, group=group, group_peer=rank))
        for work in dist.batch_isend_irecv(operations):
            work.wait()
        return whole


def lay_out_partitions(muon: MuonAdamW, zero: Any, model: MobileMoE, optim: config.Optim, place: Place) -> None:
    """Tell Muon where matrices lie in the vectors of ZeRO (DeepSpeed's optimizer `zero`). Collective."""
    entries = {entry.name: entry for entry in inventory.tensors(model.config)}
    names = {parameter: name for name, parameter in model.named_parameters()}
    exchange = Exchange()
    for group, vector, parameters, ranks in zip(
        muon.param_groups,
        zero.single_partition_of_fp32_groups,
        zero.bit16_groups,
        zero.real_dp_process_group,
        strict=True,
    ):
        if group["algorithm"] != "muon":
            continue
        here = [_range(parameter) for parameter in parameters]
        everywhere: list[list[Range]] = [[] for _ in range(dist.get_world_size(ranks))]
        dist.all_gather_object(everywhere, here, group=ranks)
        whole: list[Whole] = []
        cut: list[Cut] = []
        owners: list[list[Owner]] = []
        for number, (parameter, (start, stop)) in enumerate(zip(parameters, here, strict=True)):
            if start == stop:
                continue
            matrices = matrices_of(entries[names[parameter]], place, optim)
            mine, parts = pieces(matrices, parameter._hp_mapping.hp_fragment_address.start, start, stop)
            whole += mine
            cut += parts
            ranges = [of_rank[number] for of_rank in everywhere]
            owners += [owners_of(part.which, matrices.size, ranges) for part in parts]
        muon.lay_out(vector, whole, cut)
        exchange.plan(vector, ranks, owners)
    muon.complete = exchange


def _range(parameter: Any) -> Range:
    """Which elements of a parameter live in this rank's vector."""
    mapping = parameter._hp_mapping  # DeepSpeed's record; None when they live elsewhere
    if mapping is None:
        return 0, 0
    address = mapping.lp_fragment_address
    return address.start, address.start + address.numel


def gather_over(groups: Groups) -> Gather:
    """Whole matrices out of the parts that the ranks of this tensor-parallel group hold; they call it together."""

    def gather(part: Tensor, axis: int) -> tuple[Tensor, int]:
        parts = [torch.empty_like(part, memory_format=torch.contiguous_format) for _ in range(groups.place.tp_size)]
        dist.all_gather(parts, part.contiguous(), group=groups.tp)
        return torch.cat(parts, axis), groups.place.tp_rank * part.shape[axis]

    return gather
