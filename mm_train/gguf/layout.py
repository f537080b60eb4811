"""What a GGUF file of a network holds: tensors under llama.cpp's names, and keys. Torch-free.

llama.cpp's architecture `hy_v3` has all of MobileMoE: sigmoid router, selection bias, normalised and scaled weights of
the chosen experts, a shared expert of a width of its own, QK-norm before RoPE, grouped-query attention, a tied head,
and, for dense networks, blocks with a plain MLP. QK-norm has weights there: they are written as ones. Its RoPE turns
pairs (i, i + C/2) where ours turns (2i, 2i+1): the rows of q and k are put in that order, head by head, which changes
no product of a query with a key.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from mm_train import config, inventory
from mm_train.cli import UserError
from mm_train.inventory import Entry

ARCHITECTURE = "hy_v3"
BLOCK = 32  # weights of a Q4_0 block, which share a scale
BLOCK_BYTES = 18  # of it: the scale in float16, then 16 bytes of two codes each
SIGMOID, SOFTMAX = 2, 1  # llama.cpp's numbers for how router logits become scores

# Part of the network's name -> llama.cpp's, in a block.
IN_BLOCK = {
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.q_proj.weight": "attn_q.weight",
    "self_attn.k_proj.weight": "attn_k.weight",
    "self_attn.v_proj.weight": "attn_v.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "feed_forward.router.weight": "ffn_gate_inp.weight",
    "feed_forward.expert_bias": "exp_probs_b",
    "feed_forward.experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "feed_forward.experts.down_proj": "ffn_down_exps.weight",
    "feed_forward.shared_expert.gate_proj.weight": "ffn_gate_shexp.weight",
    "feed_forward.shared_expert.up_proj.weight": "ffn_up_shexp.weight",
    "feed_forward.shared_expert.down_proj.weight": "ffn_down_shexp.weight",
    "feed_forward.gate_proj.weight": "ffn_gate.weight",
    "feed_forward.up_proj.weight": "ffn_up.weight",
    "feed_forward.down_proj.weight": "ffn_down.weight",
}
OUTSIDE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
FLOAT = ("router.weight", "expert_bias", "norm.weight")  # endings of what stays float32


class Tensor(NamedTuple):
    """A tensor of the file. `shape` as numpy has it: the input dimension last."""

    name: str
    shape: tuple[int, ...]
    quantised: bool  # Q4_0 along the last dimension, else float32
    source: str  # the network's tensor; "": ones
    view: str  # plain | heads: rows of each head put into RoPE's order | experts: [E, in, out] -> [E, out, in]

    @property
    def bytes(self) -> int:
        size = math.prod(self.shape)
        return size // BLOCK * BLOCK_BYTES if self.quantised else 4 * size


def tensors(model: config.Model) -> Iterator[Tensor]:
    """Every tensor of the file, in order. Raises UserError for a network that llama.cpp's architecture has not."""
    _refuse_unsupported(model)
    for entry in inventory.tensors(model):
        if entry.name in OUTSIDE:
            yield _tensor(OUTSIDE[entry.name], entry)
            continue
        _, _, index, part = entry.name.split(".", 3)
        yield _tensor(f"blk.{index}.{IN_BLOCK[part]}", entry)
        if part == "self_attn.o_proj.weight":
            for which in "qk":
                yield Tensor(f"blk.{index}.attn_{which}_norm.weight", (model.head_dim,), False, "", "plain")


def _tensor(name: str, entry: Entry) -> Tensor:
    quantised = not entry.name.endswith(FLOAT)
    if "q_proj" in entry.name or "k_proj" in entry.name:
        return Tensor(name, entry.shape, quantised, entry.name, "heads")
    if entry.part == "routed experts":
        experts, width_in, width_out = entry.shape
        return Tensor(name, (experts, width_out, width_in), quantised, entry.name, "experts")
    return Tensor(name, entry.shape, quantised, entry.name, "plain")


def _refuse_unsupported(model: config.Model) -> None:
    if model.num_local_experts and not model.intermediate_size_mlp:
        raise UserError(
            f"{model.name} has no shared expert: llama.cpp's architecture {ARCHITECTURE} wants one, so it has no GGUF"
        )


def values(model: config.Model) -> dict[str, int | float | bool | str]:
    """Keys of the network, after "hy_v3."."""
    found: dict[str, int | float | bool | str] = {
        "block_count": model.num_hidden_layers,
        "context_length": model.max_position_embeddings,
        "embedding_length": model.hidden_size,
        "feed_forward_length": model.intermediate_size_mlp,
        "vocab_size": model.vocab_size,
        "attention.head_count": model.num_attention_heads,
        "attention.head_count_kv": model.num_key_value_heads,
        "attention.key_length": model.head_dim,
        "attention.value_length": model.head_dim,
        "attention.layer_norm_rms_epsilon": float(model.rms_norm_eps),
        "rope.dimension_count": model.head_dim,
        "rope.freq_base": float(model.rope_theta),
        "expert_feed_forward_length": model.intermediate_size,
    }
    if model.num_local_experts:
        found |= {
            "expert_count": model.num_local_experts,
            "expert_used_count": model.num_experts_per_tok,
            "expert_shared_feed_forward_length": model.intermediate_size_mlp,
            "expert_gating_func": SIGMOID if model.scoring_func == "sigmoid" else SOFTMAX,
            "expert_weights_norm": model.norm_topk_prob,
            "expert_weights_scale": float(model.routed_scaling_factor),
        }
    return found | rope_values(model)


def rope_values(model: config.Model) -> dict[str, int | float | str]:
    """Llama-3 scaling with equal factors, in YaRN's words, as far as a file can say it; see `rope_flags`."""
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    return {
        "rope.scaling.type": "yarn",
        "rope.scaling.factor": float(scaling.factor),
        "rope.scaling.original_context_length": scaling.original_max_position_embeddings,
        "rope.scaling.attn_factor": attention_factor(scaling),
    }


def attention_factor(scaling: config.RopeScaling) -> float:
    """What undoes YaRN's scaling of attention, which Llama-3 scaling has not."""
    return 1 / (1 + 0.1 * math.log(scaling.factor))


def rope_flags(model: config.Model) -> dict[str, float]:
    """What llama.cpp has to be told beside the file, by the names of its flags without the dashes; {}: nothing.

    YaRN with both betas at 1 is a hard switch at one wavelength, and so is Llama-3 scaling with equal factors. For
    this architecture llama.cpp reads no betas from the file; without the flags its output is silently wrong.
    Raises UserError for scaling that YaRN has no words for.
    """
    scaling = model.rope_scaling
    if scaling is None:
        return {}
    if scaling.low_freq_factor != scaling.high_freq_factor:
        raise UserError(
            f"rope_scaling with low_freq_factor {scaling.low_freq_factor:g} and high_freq_factor"
            f" {scaling.high_freq_factor:g} has no equal in llama.cpp's {ARCHITECTURE}: they must be the same"
        )
    return {"yarn-beta-fast": scaling.high_freq_factor, "yarn-beta-slow": scaling.low_freq_factor}
