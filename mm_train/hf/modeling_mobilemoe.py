"""The MobileMoE network (arXiv 2605.27358) for transformers 5. Self-contained: copied into release folders.

    model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)

Shape suffixes: B batch rows, T new tokens of a row, S tokens of a row that keys exist for (cached and new), N = B * T,
D model width, H query heads, G key-value heads, C head width, V vocabulary, E experts, K experts of a token, R = N * K
rows of expert inputs, F hidden width of an expert. Linear weights are [out, in], expert weights [E, in, out].
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from .configuration_mobilemoe import INT4_GROUP, MobileMoEConfig

# transformers 5.24 renamed past_key_values to cache, in what `generate` passes and in what a model returns.
CACHE_FIELD = "cache" if "cache" in BaseModelOutputWithPast.__dataclass_fields__ else "past_key_values"
Rope = tuple[Tensor, Tensor]  # cosines and sines, float32, [B or 1, 1, T, C / 2]


class MobileMoERMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_table(config: MobileMoEConfig, position_ids: Tensor) -> Rope:
    """Cosines and sines for positions [B or 1, T].

    Llama-3 scaling divides slow frequencies by `factor`. With equal low and high factors, as MobileMoE has them, it is
    a switch at one wavelength; the usual interpolation formula would be 0 / 0 there.
    """
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float32, device=position_ids.device) / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    if config.rope_scaling is not None:
        low, high = config.rope_scaling["low_freq_factor"], config.rope_scaling["high_freq_factor"]
        turns = config.rope_scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
        keep = (turns >= high).float() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
        frequencies = frequencies * (keep + (1 - keep) / config.rope_scaling["factor"])
    angles = position_ids[:, None, :, None].float() * frequencies
    return angles.cos(), angles.sin()


def apply_rope(x_BHTC: Tensor, rope: Rope) -> Tensor:
    """Turn adjacent pairs (x[2i], x[2i+1]), not halves, by position * frequency_i, in float32."""
    cos, sin = rope
    even, odd = x_BHTC.float().unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], -1).flatten(-2).to(x_BHTC.dtype)


def visible_keys(attention_mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor | None:
    """Which keys a query may look at: bool [B or 1, 1, T, S] with S = past + T, or None for plain causal attention.

    `attention_mask` is [B, S], 0 where a token is padding; None: there is none. A [B, 1, T, S] mask is taken as it is.
    """
    if attention_mask is not None and attention_mask.ndim == 4:
        return attention_mask
    total = past + length
    if attention_mask is not None and attention_mask.shape[-1] < total:
        raise ValueError(f"attention_mask covers {attention_mask.shape[-1]} tokens; cached and new ones are {total}")
    if attention_mask is not None and bool(attention_mask[:, :total].all()):
        attention_mask = None
    if attention_mask is None and (past == 0 or length == 1):
        return None
    causal = torch.ones(length, total, dtype=torch.bool, device=device).tril(past)[None, None]
    if attention_mask is None:
        return causal
    itself = causal.triu(past)  # so that padding sees something: a softmax over nothing is NaN
    return causal & (attention_mask[:, None, None, :total].bool() | itself)


class MobileMoEAttention(nn.Module):
    """Causal grouped-query attention; queries and keys are normalised per head, without a weight."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        query, key_value = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value, bias=False)
        self.o_proj = nn.Linear(query, config.hidden_size, bias=False)

    def forward(self, x_BTD: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None, past: int) -> Tensor:
        head_dim, eps = self.config.head_dim, self.config.rms_norm_eps
        q_BHTC, k_BGSC, v_BGSC = (
            proj(x_BTD).unflatten(-1, (-1, head_dim)).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BHTC, k_BGSC = (
            apply_rope(F.rms_norm(t.float(), (head_dim,), eps=eps).to(t.dtype), rope) for t in (q_BHTC, k_BGSC)
        )
        if cache is not None:
            total = past + x_BTD.shape[1]
            slots = torch.arange(past, total, device=x_BTD.device)  # only early 5.x static caches ask for them
            k_BGSC, v_BGSC = cache.update(k_BGSC, v_BGSC, self.layer_idx, {"cache_position": slots})
            k_BGSC, v_BGSC = k_BGSC[:, :, :total], v_BGSC[:, :, :total]  # a static cache has empty slots behind
        if mask is not None:  # the fused kernels that take a mask want as many key heads as query heads
            group = self.config.num_attention_heads // self.config.num_key_value_heads
            k_BGSC, v_BGSC = (t.repeat_interleave(group, dim=1) for t in (k_BGSC, v_BGSC))
        out_BHTC = F.scaled_dot_product_attention(
            q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, is_causal=mask is None and past == 0, enable_gqa=mask is None
        )
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))


class MobileMoEMLP(nn.Module):
    """SwiGLU: the shared expert, or the whole feed-forward of a dense network."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size_mlp, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size_mlp, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MobileMoERouter(nn.Module):
    """Linear gate, float32 whatever the rest of the model is."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(config.num_local_experts, config.hidden_size, dtype=torch.float32))

    def forward(self, x_ND: Tensor) -> Tensor:
        """logits_NE."""
        with torch.autocast(x_ND.device.type, enabled=False):
            return F.linear(x_ND.float(), self.weight.float())


class MobileMoEExperts(nn.Module):
    """Weights of the routed experts: y = (silu(g) * u) @ down with (g, u) the halves of x @ gate_up, gate first."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        num, width, hidden = config.num_local_experts, config.hidden_size, config.intermediate_size
        self.gate_up_proj = nn.Parameter(torch.empty(num, width, 2 * hidden))
        self.down_proj = nn.Parameter(torch.empty(num, hidden, width))

    def forward(self, x_RD: Tensor, counts_E: Tensor) -> Tensor:
        """y_RD for rows sorted by expert, `counts_E` of each. Only experts that have rows are computed."""
        x_RD = x_RD.to(self.gate_up_proj.dtype)
        if _has_grouped_mm(x_RD):
            ends_E = counts_E.cumsum(0).to(torch.int32)
            gate_RF, up_RF = F.grouped_mm(x_RD, self.gate_up_proj, offs=ends_E).chunk(2, dim=-1)
            return F.grouped_mm(F.silu(gate_RF) * up_RF, self.down_proj, offs=ends_E)
        outputs = []
        counts = counts_E.tolist()
        hit = [expert for expert, count in enumerate(counts) if count]
        for expert, rows in zip(hit, x_RD.split([counts[expert] for expert in hit]), strict=True):
            gate, up = (rows @ self.gate_up_proj[expert]).chunk(2, dim=-1)
            outputs.append((F.silu(gate) * up) @ self.down_proj[expert])
        return torch.cat(outputs)


def _has_grouped_mm(x: Tensor) -> bool:
    """All experts in one kernel launch. On a CPU a loop over the experts that are hit is as fast."""
    return x.is_cuda and hasattr(F, "grouped_mm") and torch.cuda.get_device_capability(x.device) >= (8, 0)


class MobileMoESparse(nn.Module):
    """Route, experts, combine, plus the shared expert. Never drops a token; `expert_bias` is not trained."""

    expert_bias: Tensor

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__()
        self.config = config
        self.router = MobileMoERouter(config)
        self.experts = MobileMoEExperts(config)
        if config.intermediate_size_mlp:
            self.shared_expert = MobileMoEMLP(config)
        self.register_buffer("expert_bias", torch.zeros(config.num_local_experts, dtype=torch.float32))

    def route(self, x_ND: Tensor) -> tuple[Tensor, Tensor]:
        """ids_NK and weights_NK (float32). The bias decides who is chosen, not how much it counts."""
        logits_NE = self.router(x_ND)
        scores_NE = logits_NE.softmax(-1) if self.config.scoring_func == "softmax" else logits_NE.sigmoid()
        # A stable sort: of equal candidates the lower id wins, which topk does not promise.
        order_NE = torch.sort(
            scores_NE.detach() + self.expert_bias.float(), dim=-1, descending=True, stable=True
        ).indices
        ids_NK = order_NE[:, : self.config.num_experts_per_tok]
        weights_NK = scores_NE.gather(1, ids_NK)
        if self.config.norm_topk_prob:
            weights_NK = weights_NK / (weights_NK.sum(-1, keepdim=True) + 1e-20)
        return ids_NK, weights_NK * self.config.routed_scaling_factor

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_ND = x_BTD.flatten(0, 1)
        ids_NK, weights_NK = self.route(x_ND)
        slots_R = torch.sort(ids_NK.flatten(), stable=True).indices  # slot: token * K + k; rows go by expert
        row_of_slot = torch.empty_like(slots_R)
        row_of_slot[slots_R] = torch.arange(slots_R.numel(), device=slots_R.device)
        counts_E = torch.bincount(ids_NK.flatten(), minlength=self.config.num_local_experts)
        y_RD = self.experts(x_ND[slots_R // ids_NK.shape[1]], counts_E)
        y_NKD = y_RD[row_of_slot].unflatten(0, ids_NK.shape)
        y_BTD = torch.einsum("nkd,nk->nd", y_NKD, weights_NK.to(y_RD.dtype)).view_as(x_BTD)
        return y_BTD + self.shared_expert(x_BTD) if self.config.intermediate_size_mlp else y_BTD


class MobileMoELayer(nn.Module):
    """Pre-norm attention, then pre-norm feed-forward."""

    def __init__(self, config: MobileMoEConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = MobileMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = MobileMoEAttention(config, layer_idx)
        self.post_attention_layernorm = MobileMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        self.feed_forward = MobileMoESparse(config) if config.num_local_experts else MobileMoEMLP(config)

    def forward(self, x_BTD: Tensor, rope: Rope, mask: Tensor | None, cache: Cache | None, past: int) -> Tensor:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, mask, cache, past)
        return x_BTD + self.feed_forward(self.post_attention_layernorm(x_BTD))


class MobileMoEPreTrainedModel(PreTrainedModel):
    """What both model classes share: initial values, and int4 tensors that become weights after loading."""

    config: MobileMoEConfig
    config_class = MobileMoEConfig
    base_model_prefix = "model"
    _no_split_modules = ["MobileMoELayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        """PreTrainedModel.from_pretrained; an int4 release is then dequantised to the dtype of the model."""
        loaded = super().from_pretrained(*args, **kwargs)
        dequantise(loaded[0] if isinstance(loaded, tuple) else loaded)  # a tuple with output_loading_info=True
        return loaded

    def _init_weights(self, module: nn.Module) -> None:
        for parameter in module.parameters(recurse=False):
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=self.config.initializer_range)
            else:
                nn.init.ones_(parameter)
        for buffer in module.buffers(recurse=False):
            nn.init.zeros_(buffer)


def the_cache(past_key_values: Cache | None, cache: Cache | None, others: dict[str, Any]) -> Cache | None:
    """The key-value cache under either name. Under a third one it must not get lost unseen: text would be wrong."""
    for name in (name for name, value in others.items() if isinstance(value, Cache)):
        raise TypeError(f"this version of transformers passes the cache as {name!r}, which this model does not know")
    return past_key_values if cache is None else cache


class MobileMoEModel(MobileMoEPreTrainedModel):
    """Everything below the head."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MobileMoELayer(config, index) for index in range(config.num_hidden_layers))
        self.norm = MobileMoERMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.quantization is not None:
            expect_int4(self)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast | tuple:
        """Hidden states after the last norm. Takes ids or embeddings; padding may be on either side."""
        past_key_values = the_cache(past_key_values, cache, kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        x_BTD = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        # An int at once: a static cache hands out a tensor that it changes later.
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        length = x_BTD.shape[1]
        if position_ids is None:  # rotation is relative: padding on the left may be counted
            position_ids = torch.arange(past, past + length, device=x_BTD.device)[None]
        rope = rope_table(self.config, position_ids)
        mask = visible_keys(attention_mask, past, length, x_BTD.device)
        wanted = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        hidden_states: tuple[Tensor, ...] | None = () if wanted else None
        for layer in self.layers:
            hidden_states = None if hidden_states is None else (*hidden_states, x_BTD)
            x_BTD = layer(x_BTD, rope, mask, past_key_values, past)
        x_BTD = self.norm(x_BTD)
        hidden_states = None if hidden_states is None else (*hidden_states, x_BTD)
        output = BaseModelOutputWithPast(x_BTD, past_key_values if use_cache else None, hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()


class MobileMoEForCausalLM(MobileMoEPreTrainedModel, GenerationMixin):
    """The language model. The head is the embedding: it has no module and no tensor of its own."""

    def __init__(self, config: MobileMoEConfig) -> None:
        super().__init__(config)
        self.model = MobileMoEModel(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        cache: Cache | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [B, T, V]: of the last `logits_to_keep` positions, of those a tensor lists, or of all (0).

        `labels` [B, T] are the input ids, -100 where a token is not scored; the loss shifts them.
        """
        past_key_values = the_cache(past_key_values, cache, kwargs)
        inputs = (input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, use_cache)
        hidden = self.model(*inputs, output_hidden_states=output_hidden_states, return_dict=True)
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits_BTV = F.linear(hidden.last_hidden_state[:, keep], self.model.embed_tokens.weight)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits_BTV, labels, self.config.vocab_size, **kwargs)
        output = CausalLMOutputWithPast(loss, logits_BTV, getattr(hidden, CACHE_FIELD), hidden.hidden_states)
        return output if (self.config.return_dict if return_dict is None else return_dict) else output.to_tuple()

    def create_masks_for_generate(self, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor | None:
        """`generate` calls this, where a model has it, to prepare masks for static caches: `visible_keys` will do."""
        return attention_mask


# --- mobilemoe-int4-g32: two's complement nibbles, low one first; an fp16 scale for 32 values along the last axis.


def int4_tensors(model: nn.Module) -> Iterator[tuple[nn.Module, str, str, str]]:
    """Each quantised weight: its module, its name there, and the names of codes and scales in the file."""
    for module in model.modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            yield module, "weight", "qweight", "weight_scale"
        elif isinstance(module, MobileMoEExperts):
            yield module, "gate_up_proj", "gate_up_qweight", "gate_up_scale"
            yield module, "down_proj", "down_qweight", "down_scale"


def expect_int4(model: nn.Module) -> None:
    """Put codes and scales in the place of the weights, for the loader; buffers keep their own dtypes there."""
    for module, weight, codes, scales in list(int4_tensors(model)):
        *outer, width = getattr(module, weight).shape
        setattr(module, weight, None)
        module.register_buffer(codes, torch.empty(*outer, width // 2, dtype=torch.uint8))
        module.register_buffer(scales, torch.empty(*outer, width // INT4_GROUP, dtype=torch.float16))


@torch.no_grad()
def dequantise(model: MobileMoEPreTrainedModel) -> None:
    """Turn loaded codes and scales into weights of the model's dtype, one tensor after the other."""
    if model.config.quantization is None:
        return
    if any(tensor.is_meta for tensor in (*model.parameters(), *model.buffers())):
        raise ValueError("an int4 release cannot be offloaded to memory or disk: choose devices that hold all of it")
    dtype = model.base_model.get_parameter("norm.weight").dtype
    for module, weight, codes, scales in list(int4_tensors(model)):
        packed, scale = getattr(module, codes), getattr(module, scales)
        nibbles = torch.stack([packed & 0xF, packed >> 4], dim=-1).flatten(-2).to(torch.int8)
        values = torch.where(nibbles > 7, nibbles - 16, nibbles).unflatten(-1, (-1, INT4_GROUP)).float()
        values = (values * scale.float()[..., None]).flatten(-2)
        delattr(module, codes)
        delattr(module, scales)
        setattr(module, weight, nn.Parameter(values.to(dtype)))
    model.config.quantization = None
