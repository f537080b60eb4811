"""Every tensor of a network by name, shape and part: the one list behind parameter counts and file formats. Torch-free.

Axes: V vocabulary, D model width, H query heads, G key-value heads, C head width, E experts, F expert hidden width,
S hidden width of the shared expert (or of a dense network's MLP).
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mm_train.config import Model
from mm_train.rules import PARTS  # in the order in which they are shown

# Of tensors that training owns for each parameter: AdamW's. Muon's matrices have no second moment.
KINDS = ("weight", "exp_avg", "exp_avg_sq")


class Entry(NamedTuple):
    """A tensor of the network under its name in bf16 releases, which is its name in the module too."""

    name: str
    shape: tuple[int, ...]
    part: str

    @property
    def size(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)


def tensors(model: Model) -> Iterator[Entry]:
    """All tensors of a network, the router's selection bias included, in the module's order."""
    width, head = model.hidden_size, model.head_dim
    query, key_value = model.num_attention_heads * head, model.num_key_value_heads * head
    yield Entry("model.embed_tokens.weight", (model.vocab_size, width), "embedding")
    for index in range(model.num_hidden_layers):
        layer = f"model.layers.{index}."
        yield Entry(layer + "input_layernorm.weight", (width,), "norms")
        yield Entry(layer + "self_attn.q_proj.weight", (query, width), "attention")
        yield Entry(layer + "self_attn.k_proj.weight", (key_value, width), "attention")
        yield Entry(layer + "self_attn.v_proj.weight", (key_value, width), "attention")
        yield Entry(layer + "self_attn.o_proj.weight", (width, query), "attention")
        yield Entry(layer + "post_attention_layernorm.weight", (width,), "norms")
        yield from _feed_forward(model, layer + "feed_forward.")
    yield Entry("model.norm.weight", (width,), "norms")


def is_buffer(name: str) -> bool:
    """Is this a tensor that is not trained by gradients, hence without moments: the selection bias?"""
    return name.endswith(".expert_bias")


def _feed_forward(model: Model, prefix: str) -> Iterator[Entry]:
    width, experts, hidden = model.hidden_size, model.num_local_experts, model.intermediate_size
    if experts == 0:
        yield from _mlp(model, prefix, "mlp")
        return
    yield Entry(prefix + "expert_bias", (experts,), "router")
    yield Entry(prefix + "router.weight", (experts, width), "router")
    yield Entry(prefix + "experts.gate_up_proj", (experts, width, 2 * hidden), "routed experts")
    yield Entry(prefix + "experts.down_proj", (experts, hidden, width), "routed experts")
    if model.intermediate_size_mlp:
        yield from _mlp(model, prefix + "shared_expert.", "shared expert")


def _mlp(model: Model, prefix: str, part: str) -> Iterator[Entry]:
    width, hidden = model.hidden_size, model.intermediate_size_mlp
    yield Entry(prefix + "gate_proj.weight", (hidden, width), part)
    yield Entry(prefix + "up_proj.weight", (hidden, width), part)
    yield Entry(prefix + "down_proj.weight", (width, hidden), part)


def parameters(model: Model) -> dict[str, int]:
    """Number of parameters of each part that the network has, in the order of PARTS."""
    counts = dict.fromkeys(PARTS, 0)
    for entry in tensors(model):
        counts[entry.part] += entry.size
    return {part: count for part, count in counts.items() if count}


def active_parameters(model: Model) -> dict[str, int]:
    """Those that take part in one token's forward pass; the embedding, tied to the head, counts once."""
    counts = parameters(model)
    if model.num_local_experts:
        counts["routed experts"] = counts["routed experts"] // model.num_local_experts * model.num_experts_per_tok
    return counts
