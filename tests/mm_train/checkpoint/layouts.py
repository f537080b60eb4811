"""Many ranks without processes: each is a thread with an engine that holds its part of given whole tensors."""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mm_train import config, inventory
from mm_train.anomalies import Anomalies
from mm_train.engine import Fragment
from mm_train.inventory import KINDS, is_buffer
from mm_train.parallel.groups import Groups
from mm_train.sharding import Place, local_box, local_boxes

FACTS = {
    "samples": 24,
    "rows_per_step": 8,
    "updates": 3,
    "data": {"seed": 0, "seq_len": 64, "sources": {"code": {"samples_in_1000": 1000, "shards": "a" * 64}}},
    "anomalies": Anomalies(config.Faults()).state(),
}
# A network with a tensor of every kind, as small as it gets.
LEAST = config.Model(
    vocab_size=8,
    hidden_size=4,
    intermediate_size=3,
    intermediate_size_mlp=6,
    num_hidden_layers=1,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=2,
    num_local_experts=4,
    num_experts_per_tok=2,
)

State = dict[str, dict[str, Tensor]]  # kind -> name -> whole tensor


def random_state(model: config.Model, seed: int = 0) -> State:
    """Different numbers everywhere."""
    generator = torch.Generator().manual_seed(seed)
    entries = list(inventory.tensors(model))
    state: State = {kind: {} for kind in KINDS}
    for kind in KINDS:
        for entry in entries:
            if kind == "weight" or not is_buffer(entry.name):
                state[kind][entry.name] = torch.randn(entry.shape, generator=generator)
    return state


class Network:
    """What a checkpoint asks of a model."""

    def __init__(self, shape: config.Model, state: State, place: Place) -> None:
        self.config = shape
        local = {e.name: state["weight"][e.name][b.slices].clone() for e, b in local_boxes(shape, place)}
        self.buffers = {name: tensor for name, tensor in local.items() if is_buffer(name)}
        self.parameters = {name: tensor for name, tensor in local.items() if not is_buffer(name)}

    def named_buffers(self):
        return self.buffers.items()

    def named_parameters(self):
        return self.parameters.items()


class SlicedEngine:
    """Holds boxes of whole tensors; answers for given flat ranges of them."""

    def __init__(self, shape: config.Model, state: State, place: Place, fragments: Sequence[Fragment]) -> None:
        self.model = Network(shape, state, place)
        self._fragments = list(fragments)
        self.boxes = {e.name: b for e, b in local_boxes(shape, place) if not is_buffer(e.name)}
        self.local = {
            kind: {name: state[kind][name][box.slices].clone() for name, box in self.boxes.items()} for kind in KINDS
        }
        self.step = 0

    def fragments(self) -> list[Fragment]:
        return self._fragments

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        name, start, stop = fragment
        return {kind: self.local[kind][name].view(-1)[start:stop] for kind in KINDS}

    def restore(self, name: str, read: Callable[[str, int, int], Tensor]) -> None:
        size = self.boxes[name].size
        self.local["weight"][name].view(-1).copy_(read("weight", 0, size))
        for fragment in self._fragments:
            if fragment.name == name:
                for kind in KINDS[1:]:
                    self.state(fragment)[kind].copy_(read(kind, fragment.start, fragment.stop))

    def restore_step(self, step: int) -> None:
        self.step = step

    def is_like(self, state: State) -> bool:
        """Does it hold, bit for bit, its part of `state`?"""
        same = [torch.equal(self.local["weight"][n], state["weight"][n][b.slices]) for n, b in self.boxes.items()]
        same += [torch.equal(buffer, state["weight"][name]) for name, buffer in self.model.buffers.items()]
        for fragment in self._fragments:
            box, live = self.boxes[fragment.name], self.state(fragment)
            for kind in KINDS[1:]:
                want = state[kind][fragment.name][box.slices].reshape(-1)[fragment.start : fragment.stop]
                same.append(torch.equal(live[kind], want))
        return all(same)


@dataclass
class Shared:
    """What the threads of a world meet at."""

    ranks: int
    values: list[Any] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.values = [None] * self.ranks
        self.barrier = threading.Barrier(self.ranks, timeout=60)


@dataclass
class ThreadGroups(Groups):
    """Groups whose ranks are threads."""

    shared: Shared = field(default_factory=lambda: Shared(1))

    def gather(self, value: Any) -> list[Any]:
        self.shared.values[self.rank] = value
        self.barrier()
        values = list(self.shared.values)
        self.barrier()
        return values

    def barrier(self) -> None:
        self.shared.barrier.wait()


def world(ep: int = 1, tp: int = 1, replicas: int = 1) -> list[ThreadGroups]:
    """The ranks of a layout, numbered as mm_train.parallel.groups does."""
    shared = Shared(tp * ep * replicas)
    groups = []
    for rank in range(shared.ranks):
        dp_rank, tp_rank = divmod(rank, tp)
        place = Place(dp_rank % ep, ep, tp_rank, tp)
        groups.append(ThreadGroups(rank, shared.ranks, place=place, dp_rank=dp_rank, shared=shared))
    return groups


def engines(
    shape: config.Model,
    state: State,
    groups: Sequence[ThreadGroups],
    cut: Callable[[int, int], Sequence[int]] | None = None,
) -> list[SlicedEngine]:
    """An engine for each rank. Those that hold the same part of a tensor share it out at the places that `cut`
    (elements, ranks -> ranks - 1 sorted places) chooses; by default in equal parts."""
    cut = cut or (lambda size, ranks: [size * i // ranks for i in range(1, ranks)])
    fragments: list[list[Fragment]] = [[] for _ in groups]
    for entry in inventory.tensors(shape):
        if is_buffer(entry.name):
            continue
        owners: dict[Any, list[int]] = {}
        for member in groups:
            owners.setdefault(local_box(entry, member.place), []).append(member.rank)
        for box, ranks in owners.items():
            places = [0, *cut(box.size, len(ranks)), box.size]
            for rank, start, stop in zip(ranks, places, places[1:], strict=False):
                if start < stop:
                    fragments[rank].append(Fragment(entry.name, start, stop))
    return [SlicedEngine(shape, state, g.place, f) for g, f in zip(groups, fragments, strict=True)]


def together(groups: Sequence[ThreadGroups], work: Callable[[int], Any]) -> list[Any]:
    """Run `work(rank)` in a thread for each rank; what each returned, or the exception that it raised."""
    results: list[Any] = [None] * len(groups)

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            results[rank] = error
            if not isinstance(error, Exception):
                groups[rank].shared.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(len(groups))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results
