"""Which experts a model chose for which token, and how many of the choices are others in another model.

with RoutingRecord(model) as record:
    validate(model, ..., seen=record.keep)
share_L = changed(record_of_another_model.choices, record.choices)
"""

import numpy as np
import torch
from torch import Tensor, nn

from kernels.cross_entropy import IGNORE
from kernels.router import route
from mm_train.data import Batch
from mm_train.model import MobileMoE

Choices = list[np.ndarray]  # for each layer, ids of the chosen experts [tokens, K], int16


class RoutingRecord:
    """Listens to the routers of a model inside a `with` block."""

    def __init__(self, model: MobileMoE) -> None:
        self._layers = model.moe_layers()
        self._kept: list[list[np.ndarray]] = [[] for _ in self._layers]
        self._last: list[Tensor | None] = [None] * len(self._layers)  # ids_TK of the forward pass under way
        self._hooks: list[torch.utils.hooks.RemovableHandle] = []

    def __enter__(self) -> "RoutingRecord":
        for index, layer in enumerate(self._layers):

            def listen(_: nn.Module, __: object, logits_TE: Tensor, index: int = index) -> None:
                self._last[index] = route(logits_TE, *self._layers[index].routing_options())[0]

            self._hooks.append(layer.router.register_forward_hook(listen))
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
