"""Counts which experts a model's routers choose while it answers, without a say in what it answers.

Two counts: at every token that the model is given to read (prompts and choices, never padding or what it writes), and
at every token from which one is predicted that counts: a token of a choice, or the next one that is written. A prompt
that several rows share counts for each of them, though it is computed once. So the counts belong to the questions: they
depend neither on batches nor on the number of processes.

Shapes: N tokens of a forward pass (B rows x T columns), L layers, E experts, K chosen experts.
"""

import numpy as np
import torch
from torch import Tensor

from mm_train.model import MobileMoE
from mm_train.routing_record import listen


class ExpertCounts:
    """Listens to the routers of a model as long as both live."""

    def __init__(self, model: MobileMoE) -> None:
        layers = len(model.moe_layers())
        device = model.model.embed_tokens.weight.device
        self._counts = torch.zeros(2, layers, model.config.num_local_experts, dtype=torch.long, device=device)
        self._tokens: Tensor | None = None
        self._last = layers - 1
        listen(model, self._heard)

    def expect(self, read_BT: Tensor, scored_BT: Tensor) -> None:
        """Which tokens of the next forward pass are read, and which scored; without this call the model is writing."""
        self._tokens = torch.stack([read_BT.flatten(), scored_BT.flatten()]).long()

    def _heard(self, layer: int, ids_TK: Tensor) -> None:
        tokens_2N = self._tokens
        if tokens_2N is None:
            tokens_2N = torch.tensor([[0], [1]], device=ids_TK.device).expand(2, len(ids_TK))
        slots = tokens_2N.repeat_interleave(ids_TK.shape[1], dim=1)
        self._counts[:, layer].index_add_(1, ids_TK.flatten().long(), slots)
        if layer == self._last:
            self._tokens = None

    def take(self) -> np.ndarray:
        """What was counted since the last call, int64 [2, L, E]: READ and SCORED."""
        taken = self._counts.cpu().numpy().copy()
        self._counts.zero_()
        return taken
