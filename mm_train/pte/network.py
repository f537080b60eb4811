"""The network in the operators that ExecuTorch has kernels for: (tokens [1, T], position [1]) -> logits [1, V].

Experts, and the shared expert as one of a single expert, are `llama::quantized_moe_ffn`; the embedding is
`embedding_4bit`; projections and head are linears that XNNPACK takes over, with int8 activations a token. Keys and
values are kept in buffers of the program (`llama::update_cache`, `llama::custom_sdpa`). Logits are of the last token.

Shapes: T tokens, D model width, C head width, S places in the cache.
"""

import importlib
from typing import Any

import torch
from torch import Tensor, nn

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.model import rope_frequencies
from mm_train.pte.pack import GROUP, pack_experts, pack_table


def refuse_unsupported(model: config.Model) -> None:
    """Raises UserError for a network that the operator does not compute."""
    if model.num_local_experts and (model.scoring_func != "sigmoid" or not model.norm_topk_prob):
        raise UserError(
            f"{model.name}: ExecuTorch's operator has routers with normalised sigmoid scores only, not"
            f" scoring_func={model.scoring_func}, norm_topk_prob={model.norm_topk_prob}"
        )


def linear(source: ExportSource, name: str) -> nn.Linear:
    """A linear on the int4 grid, its input quantised to int8 by token: what XNNPACK takes over whole."""
    library: Any = importlib.import_module("torchao.quantization.quantize_.workflows.intx.intx_unpacked_to_int8_tensor")
    codes, scales = source.int4(name, -1)
    with torch.device("meta"):
        made = nn.Linear(codes.shape[1], codes.shape[0], bias=False)
    weight = library.IntxUnpackedToInt8Tensor(
        codes,
        scales.float(),
        torch.zeros_like(scales, dtype=torch.int8),
        getattr(torch, "int4"),  # noqa: B009 - a type checker does not know it
        (1, GROUP),
        torch.float32,
        library.IntxUnpackedToInt8TensorActivationQuantization.INT8_ASYM_PER_TOKEN,
    )
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made


def rms(x: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps)."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)


def rotate(x_1TGC: Tensor, cos_TC: Tensor, sin_TC: Tensor) -> Tensor:
    """Turn adjacent pairs, as mm_train.model.apply_rope does."""
    pairs = x_1TGC.unflatten(-1, (-1, 2))
    first, second = pairs[..., 0], pairs[..., 1]
    cos, sin = cos_TC[:, None], sin_TC[:, None]
    return torch.stack([first * cos - second * sin, first * sin + second * cos], -1).flatten(-2)


class FeedForward(nn.Module):
    """Some experts, all of them in one operator: the routed ones, or a single one that every token passes."""

    router: Tensor

    def __init__(self, model: config.Model, source: ExportSource, prefix: str, routed: bool) -> None:
        super().__init__()
        if routed:
            hidden, self.chosen, self.scoring = model.intermediate_size, model.num_experts_per_tok, "sigmoid"
            pairs = [source.int4(f"{prefix}experts.{part}", -2) for part in ("gate_up_proj", "down_proj")]
            packed = [pack_experts(*(part.transpose(1, 2) for part in pair)) for pair in pairs]
            router, bias = source.read(f"{prefix}router.weight"), source.read(f"{prefix}expert_bias")
        else:  # softmax over a single expert gives it the weight 1
            hidden, self.chosen, self.scoring = model.intermediate_size_mlp, 1, "softmax"
            gate, up, down = (source.int4(f"{prefix}{part}_proj.weight", -1) for part in ("gate", "up", "down"))
            both = tuple(torch.cat(parts) for parts in zip(gate, up, strict=True))
            packed = [pack_experts(*(part[None] for part in pair)) for pair in (both, down)]
            router, bias = torch.zeros(1, model.hidden_size), torch.zeros(0)
        self.hidden, self.width, self.scale = hidden, model.hidden_size, float(model.routed_scaling_factor)
        for name, values in zip(("router", "bias", "gate_up", "down"), (router, bias, *packed), strict=True):
            self.register_buffer(name, values)

    def forward(self, x_TD: Tensor) -> Tensor:
        sizes = (self.chosen, len(self.router), self.hidden, self.width, GROUP, 4)
        tensors = (self.router, self.bias, self.gate_up, self.down)
        return torch.ops.llama.quantized_moe_ffn(x_TD, *tensors, *sizes, self.scoring, self.scale)


class Layer(nn.Module):
    """Attention with its cache, then experts."""

    q: nn.Linear
    k: nn.Linear
    v: nn.Linear
    o: nn.Linear
    norm: Tensor
    post_norm: Tensor

    def __init__(self, model: config.Model, source: ExportSource, index: int, places: int) -> None:
        super().__init__()
        prefix = f"model.layers.{index}."
        self.eps, self.head_dim = model.rms_norm_eps, model.head_dim
        for part in "qkvo":
            setattr(self, part, linear(source, f"{prefix}self_attn.{part}_proj.weight"))
        self.register_buffer("norm", source.read(f"{prefix}input_layernorm.weight"))
        self.register_buffer("post_norm", source.read(f"{prefix}post_attention_layernorm.weight"))
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, places, model.num_key_value_heads, model.head_dim))
        self.parts = nn.ModuleList()
        if model.num_local_experts:
            self.parts.append(FeedForward(model, source, f"{prefix}feed_forward.", True))
            if model.intermediate_size_mlp:
                self.parts.append(FeedForward(model, source, f"{prefix}feed_forward.shared_expert.", False))
        else:
            self.parts.append(FeedForward(model, source, f"{prefix}feed_forward.", False))

    def forward(self, x_TD: Tensor, cos_TC: Tensor, sin_TC: Tensor, start: int) -> Tensor:
        h_TD = rms(x_TD, self.eps) * self.norm
        q, k, v = (part(h_TD).unflatten(-1, (-1, self.head_dim))[None] for part in (self.q, self.k, self.v))
        q, k = (rotate(rms(t, self.eps), cos_TC, sin_TC) for t in (q, k))
        torch.ops.llama.update_cache(k, self.keys, start)
        torch.ops.llama.update_cache(v, self.values, start)
        seen = torch.ops.llama.custom_sdpa(q, self.keys, self.values, start, None, 0.0, True)
        x_TD = x_TD + self.o(seen[0].flatten(1))
        h_TD = rms(x_TD, self.eps) * self.post_norm
        for part in self.parts:
            x_TD = x_TD + part(h_TD)
        return x_TD


class Network(nn.Module):
    """All of it. `places`: tokens that the cache holds."""

    cos: Tensor
    sin: Tensor
    norm: Tensor

    def __init__(self, source: ExportSource, places: int) -> None:
        """Raises UserError for a network that the operator does not compute."""
        super().__init__()
        model = source.shape
        refuse_unsupported(model)
        self.eps, self.places = model.rms_norm_eps, places
        codes, scales = source.int4("model.embed_tokens.weight", -1)
        self.register_buffer("table", pack_table(codes))
        self.register_buffer("table_scales", scales.float())
        self.layers = nn.ModuleList(Layer(model, source, i, places) for i in range(model.num_hidden_layers))
        self.register_buffer("norm", source.read("model.norm.weight"))
        self.head = linear(source, "model.embed_tokens.weight")
        angles = torch.arange(places).float()[:, None] * rope_frequencies(model)
        self.register_buffer("cos", angles.cos())
        self.register_buffer("sin", angles.sin())

    def forward(self, tokens_1T: Tensor, position: Tensor) -> Tensor:
        start = position[0].item()
        torch._check(start >= 0)
        torch._check(start < self.places)
        where_T = torch.arange(tokens_1T.shape[1]) + start
        cos_TC, sin_TC = self.cos[where_T], self.sin[where_T]
        embedding = torch.ops.quantized_decomposed.embedding_4bit
        x_TD = embedding(self.table, self.table_scales, None, -8, 7, tokens_1T[0])
        for layer in self.layers:
            x_TD = layer(x_TD, cos_TC, sin_TC, start)
        return self.head(rms(x_TD[-1:], self.eps) * self.norm)
