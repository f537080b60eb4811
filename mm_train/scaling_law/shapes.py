"""Networks by the paper's shape rules, each counted exactly: the candidates of a plan. Torch-free.

d_ff / d_model = 4, d_model / n_layers about 40, 4 key-value heads, heads of 64. A token meets experts that are together
d_ff wide: g of them with granularity g, half of their width in one shared expert where there is one. E times as many
exist. E = 8, g = 8 with a shared expert are the 60 routed ones, 4 a token, of MobileMoE-S, M and L.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mm_train import inventory
from mm_train.cli import UserError
from mm_train.config import Model, RopeScaling
from mm_train.rules import validate_model

HEAD, KV_HEADS, FF = 64, 4, 4
ASPECT, ASPECT_SLACK = 40, 0.2  # d_model / n_layers; S, M and L have 38.4, 39.4 and 40
STEP, WIDEST = 128, 4096  # of d_model: with g = 8 experts are multiples of 64 wide, a tile of the kernels
VOCABULARY = 128_256  # Llama 3's


def network(
    width: int, layers: int, expansion: int, granularity: int, shared: bool, vocabulary: int = VOCABULARY
) -> Model:
    """The network of this width and depth. Raises UserError where granularity does not divide the experts."""
    heads = max(KV_HEADS, round(width / HEAD / KV_HEADS + 1e-9) * KV_HEADS)
    model = Model(
        name=f"planned-e{expansion}-d{width}-l{layers}",
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=0,
        intermediate_size_mlp=FF * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD,
        num_local_experts=0,
        num_experts_per_tok=0,
        rope_scaling=RopeScaling(),
    )
    if expansion > 1:
        expert, rest = divmod(FF * width, granularity)
        if rest or (shared and granularity % 2):
            raise UserError(
                f"granularity {granularity}{' with a shared expert' if shared else ''} does not divide an MLP of width"
                f" {FF * width:,}: a shared expert takes half of the {granularity}"
            )
        in_shared = granularity // 2 if shared else 0
        model.intermediate_size, model.intermediate_size_mlp = expert, in_shared * expert
        model.num_local_experts = granularity * expansion - in_shared
        model.num_experts_per_tok = granularity - in_shared
        if model.num_experts_per_tok == 1:  # normalised, its weight would always be 1
            model.norm_topk_prob, model.routed_scaling_factor = False, 1.0
    validate_model(model)
    return model


class Candidate(NamedTuple):
    """A network, and how many parameters it has."""

    model: Model
    active: int  # in one token's forward pass, the tied embedding once
    total: int


def candidates(expansion: int, granularity: int, shared: bool, vocabulary: int = VOCABULARY) -> Iterator[Candidate]:
    """All networks of an expansion by the rules, narrow ones first, shallow ones first.

    Layers are alike, so that two depths tell the exact parameters of all.
    """
    for width in range(STEP, WIDEST + 1, STEP):
        low, high = width / ASPECT / (1 + ASPECT_SLACK), width / ASPECT / (1 - ASPECT_SLACK)
        one, two = (count(network(width, layers, expansion, granularity, shared, vocabulary)) for layers in (1, 2))
        for layers in range(max(1, math.ceil(low)), int(high) + 1):
            active, total = (a + (layers - 1) * (b - a) for a, b in zip(one, two, strict=True))
            yield Candidate(network(width, layers, expansion, granularity, shared, vocabulary), active, total)


def count(model: Model) -> tuple[int, int]:
    """(active, total) parameters."""
    return sum(inventory.active_parameters(model).values()), sum(inventory.parameters(model).values())


def yaml(model: Model, comment: str) -> str:
    """A model file as those in configs/model/, which mm_train.config loads."""
    scaling = model.rope_scaling
    rope = (
        "null"
        if scaling is None
        else f"{{rope_type: {scaling.rope_type}, factor: {scaling.factor}, original_max_position_embeddings:"
        f" {scaling.original_max_position_embeddings}, low_freq_factor: {scaling.low_freq_factor},"
        f" high_freq_factor: {scaling.high_freq_factor}}}"
    )
    lines = [f"# {line}" for line in comment.splitlines()]
    lines += [
        "model:",
        f"  name: {model.name}",
        f"  vocab_size: {model.vocab_size}",
        f"  hidden_size: {model.hidden_size}",
        f"  intermediate_size: {model.intermediate_size}",
        f"  intermediate_size_mlp: {model.intermediate_size_mlp}",
        f"  num_hidden_layers: {model.num_hidden_layers}",
        f"  num_attention_heads: {model.num_attention_heads}",
        f"  num_key_value_heads: {model.num_key_value_heads}",
        f"  head_dim: {model.head_dim}",
        f"  num_local_experts: {model.num_local_experts}",
        f"  num_experts_per_tok: {model.num_experts_per_tok}",
        f"  routed_scaling_factor: {model.routed_scaling_factor}",
        f"  norm_topk_prob: {str(model.norm_topk_prob).lower()}",
        "  rms_norm_eps: 1.0e-5",
        f"  rope_theta: {model.rope_theta}",
        f"  rope_scaling: {rope}",
        f"  max_position_embeddings: {model.max_position_embeddings}",
    ]
    return "\n".join(lines) + "\n"
