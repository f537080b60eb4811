"""Which experts a model chose for which token, and how many of the choices are others in another model.

with RoutingRecord(model) as record:
    validate(model, ..., seen=record.keep)
share_L = changed(record_of_another_model.choices, record.choices)
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from kernels.cross_entropy import IGNORE
from kernels.router import route
from mm_train.data import Batch
from mm_train.model import MobileMoE

Choices = list[np.ndarray]  # for each layer, ids of the chosen experts [tokens, K], int16


def listen(model: MobileMoE, heard: Callable[[int, Tensor], None]) -> list[torch.utils.hooks.RemovableHandle]:
    """Call `heard(layer, ids_TK)` with the experts that the routers of a model choose, until the hooks are removed."""

    def hook(index: int) -> Callable[[nn.Module, object, Tensor], None]:
        return lambda _, __, logits_TE: heard(index, route(logits_TE, *layers[index].routing_options())[0])

    layers = model.moe_layers()
    return [layer.router.register_forward_hook(hook(index)) for index, layer in enumerate(layers)]


class RoutingRecord:
    """Listens to the routers of a model inside a `with` block."""

    def __init__(self, model: MobileMoE) -> None:
        self._model = model
        layers = model.moe_layers()
        self._kept: list[list[np.ndarray]] = [[] for _ in layers]
        self._last: list[Tensor | None] = [None] * len(layers)  # ids_TK of the forward pass under way
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RoutingRecord":
        self._hooks = listen(self._model, self._last.__setitem__)
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def keep(self, source: str, batch: Batch) -> None:
        """Keep the choices of the forward pass that has just been made, for the rows with anything to score."""
        rows_B = (batch.labels_BT != IGNORE).any(-1)
        tokens_N = rows_B[:, None].expand_as(batch.labels_BT).flatten()
        for kept, ids_TK in zip(self._kept, self._last, strict=True):
            assert ids_TK is not None, "no forward pass since the record began"
            kept.append(ids_TK[tokens_N].to(torch.int16).cpu().numpy())

    @property
    def choices(self) -> Choices:
        """All that was kept."""
        return [np.concatenate(kept) for kept in self._kept]


def changed(before: Choices, after: Choices) -> list[float]:
    """For each layer, the share of the choices of `before` that `after`, on the same tokens, has not made."""
    shares = []
    for old_TK, new_TK in zip(before, after, strict=True):
        stayed = (old_TK[:, :, None] == new_TK[:, None, :]).any(-1)
        shares.append(float(1 - stayed.mean()) if stayed.size else 0.0)
    return shares
