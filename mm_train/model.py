"""The MobileMoE network on one device (arXiv 2605.27358). Module names are the released checkpoints' tensor names.

Shape suffixes: B batch rows, T tokens of a row, N = B * T, D model width, H query heads, G key-value heads, C head
width, V vocabulary, L layers, E experts, S columns that attention sees. Parameters are float32 (a loaded release may
keep its matrices in 16 bits); activations run in `compute_dtype`, norms and router in float32. No parallel code:
mm_train.parallel changes a finished model from outside.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.attention import Lengths, attends_by_lengths, attention_after_prefix, document_attention
from kernels.linear import linear
from mm_train import config
from mm_train.kv_cache import Columns, KVCache
from mm_train.moe import MLP, MoELayer, RouterStats
from mm_train.quant import Embedding, Linear
from mm_train.weights import fill, initial

# What a query may look at: where a mask [B, T, S] (causal included) is True, or 0 rather than -inf; documents of these
# lengths, back from itself; or all before it.
Seen = Tensor | Lengths | None
# New keys and values [B, G, T, C] -> all that can be seen.
Append = Callable[[Tensor, Tensor], Columns]


class Losses(NamedTuple):
    """What a training forward returns: sums over this micro-batch, so that they add up over ranks and micro-steps."""

    cross_entropy_sum: Tensor  # nats over scored tokens, float32, differentiable
    z_loss_sum: Tensor  # over tokens and layers, float32, differentiable
    counts_LE: Tensor
    dropped_L: Tensor
    entropy_sum_L: Tensor  # nats over tokens, float32


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, in float32."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(x.dtype)


def rope_frequencies(model: config.Model) -> Tensor:
    """Radians a position for each of the head_dim / 2 pairs, float32.

    Llama-3 scaling with equal factors is a switch: wavelengths above original_max_position_embeddings /
    low_freq_factor are slowed by `factor`. With unequal factors the band between is interpolated as Llama 3.1 does.
    """
    exponents = torch.arange(0, model.head_dim, 2, dtype=torch.float32) / model.head_dim
    frequencies = 1.0 / model.rope_theta**exponents
    scaling = model.rope_scaling
    if scaling is None:
        return frequencies
    turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)  # full turns in the original context
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    # With equal factors the smoothing term would be 0 / 0.
    keep = (turns >= high).float() if low == high else ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * (keep + (1 - keep) / scaling.factor)


def rope_table(model: config.Model, positions: Tensor) -> Tensor:
    """cos + i sin at `positions` [T] or [B, T]: [..., 1, C / 2], complex of two float32."""
    angles = positions[..., None, None].float() * rope_frequencies(model).to(positions.device)
    return torch.complex(angles.cos(), angles.sin())


def apply_rope(x_BTHC: Tensor, rope: Tensor) -> Tensor:
    """Turn adjacent pairs (x[2i], x[2i+1]) by position * frequency_i, in float32: one product of complex numbers."""
    pairs = torch.view_as_complex(x_BTHC.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rope).flatten(-2).to(x_BTHC.dtype)


def document_mask(document_BT: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, T, T], 0 where a token may look: back within its document; -inf elsewhere.

    In the activations' dtype because fused attention would otherwise make, and keep, such a copy for every layer.
    """
    seen_BTS = (document_BT[:, :, None] == document_BT[:, None, :]).tril_()
    return torch.zeros((), dtype=dtype, device=document_BT.device).where(seen_BTS, -torch.inf)


class Attention(nn.Module):
    """Causal grouped-query attention with weightless QK-norm."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.model = model
        self.group = model.num_attention_heads // model.num_key_value_heads
        width, heads, kv_heads = model.hidden_size, model.num_attention_heads, model.num_key_value_heads
        self.q_proj = Linear(width, heads * model.head_dim)
        self.k_proj = Linear(width, kv_heads * model.head_dim)
        self.v_proj = Linear(width, kv_heads * model.head_dim)
        self.o_proj = Linear(heads * model.head_dim, width)

    def forward(self, x_BTD: Tensor, rope: Tensor, seen: Seen, append: Append | None = None) -> Tensor:
        """`append` takes the new keys and values and returns all that can be seen (mm_train.kv_cache)."""
        head_dim, eps = self.model.head_dim, self.model.rms_norm_eps
        q_BTHC, k_BTGC, v_BTGC = (
            proj(x_BTD).unflatten(-1, (-1, head_dim)) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q_BTHC, k_BTGC = (
            apply_rope(F.rms_norm(t.float(), (head_dim,), eps=eps).to(t.dtype), rope) for t in (q_BTHC, k_BTGC)
        )
        if isinstance(seen, Lengths):
            k_BTHC, v_BTHC = (t.repeat_interleave(self.group, dim=2) for t in (k_BTGC, v_BTGC))
            q_NHC, k_NHC, v_NHC = (t.flatten(0, 1) for t in (q_BTHC, k_BTHC, v_BTHC))
            out_NHC = document_attention(q_NHC, k_NHC, v_NHC, seen)
            return self.o_proj(out_NHC.view_as(q_BTHC).flatten(2))
        q_BHTC, k_BGSC, v_BGSC = (t.transpose(1, 2) for t in (q_BTHC, k_BTGC, v_BTGC))
        prefix = None
        if append is None:
            # CUDA's fused attention takes grouped heads without a mask only.
            k_BGSC, v_BGSC = (t.repeat_interleave(self.group, dim=1) for t in (k_BGSC, v_BGSC))
        else:
            k_BGSC, v_BGSC, prefix = append(k_BGSC, v_BGSC)  # memory-bound: no copies of the cache
        if prefix is not None:
            mask = None if seen is None else seen[:, None]
            out_BHTC = attention_after_prefix(q_BHTC, k_BGSC, v_BGSC, *prefix, mask)
            return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))
        out_BHTC = F.scaled_dot_product_attention(
            q_BHTC,
            k_BGSC,
            v_BGSC,
            attn_mask=None if seen is None else seen[:, None],
            is_causal=seen is None and q_BHTC.shape[2] > 1,
            enable_gqa=append is not None,
        )
        return self.o_proj(out_BHTC.transpose(1, 2).flatten(2))


class Layer(nn.Module):
    """Pre-norm attention, then pre-norm mixture of experts (or the MLP of a dense network)."""

    feed_forward: MoELayer | MLP

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.self_attn = Attention(model)
        self.post_attention_layernorm = RMSNorm(model.hidden_size, model.rms_norm_eps)
        self.feed_forward = MoELayer(model) if model.num_local_experts else MLP(model)

    def forward(
        self, x_BTD: Tensor, rope: Tensor, seen: Seen, append: Append | None = None
    ) -> tuple[Tensor, RouterStats | None]:
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD), rope, seen, append)
        h_ND, stats = self.post_attention_layernorm(x_BTD).flatten(0, 1), None
        if isinstance(self.feed_forward, MoELayer):
            y_ND, stats = (self.feed_forward.infer(h_ND), None) if append else self.feed_forward(h_ND)
        else:
            y_ND = self.feed_forward(h_ND)
        return x_BTD + y_ND.view_as(x_BTD), stats


class Backbone(nn.Module):
    """Everything below the head; holds the tied embedding."""

    def __init__(self, model: config.Model) -> None:
        super().__init__()
        self.embed_tokens = Embedding(model.vocab_size, model.hidden_size)
        self.layers = nn.ModuleList(Layer(model) for _ in range(model.num_hidden_layers))
        self.norm = RMSNorm(model.hidden_size, model.rms_norm_eps)


class MobileMoE(nn.Module):
    """The language model: `model(tokens_BT)` gives logits_BTV; with labels, the sums a training step needs."""

    def __init__(self, model: config.Model, compute_dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = model
        self.int4_scales: dict[str, Tensor] = {}  # of the int4 release these weights are from: saving keeps its codes
        self.compute_dtype = compute_dtype
        self.recompute = False  # layers keep their input only, and compute the rest again in the backward pass
        self.model = Backbone(model)

    def forward(
        self,
        tokens_BT: Tensor,
        labels_BT: Tensor | None = None,
        document_BT: Tensor | None = None,
        lengths: Lengths | None = None,
    ) -> Tensor | Losses:
        """Logits [B, T, V], or Losses when `labels_BT` is given: engines call the module, so both go through here."""
        if labels_BT is None:
            return self.logits(self.hidden(tokens_BT))
        return self.losses(tokens_BT, labels_BT, document_BT, lengths)

    def losses(
        self, tokens_BT: Tensor, labels_BT: Tensor, document_BT: Tensor | None, lengths: Lengths | None = None
    ) -> Losses:
        """Training sums. Labels are kernels.cross_entropy.IGNORE where a token is not scored.

        `document_BT` numbers the document of each token: attention stays inside a document. `lengths` says the same,
        and is what is used where attention by lengths is the fast way.
        """
        table_VD = self.model.embed_tokens.table()
        hidden_BTD, stats = self._backbone(tokens_BT, document_BT, table_VD, lengths=lengths)
        head = self.model.embed_tokens.cross_entropy_sum
        cross_entropy_sum = head(hidden_BTD.flatten(0, 1), table_VD, labels_BT.flatten())
        if not stats:  # a dense network
            none = cross_entropy_sum.new_zeros(0)
            return Losses(cross_entropy_sum, none.sum(), none.view(0, 0), none, none)
        return Losses(
            cross_entropy_sum,
            torch.stack([s.z_loss_sum for s in stats]).sum(),
            torch.stack([s.counts_E for s in stats]),
            torch.stack([s.dropped for s in stats]),
            torch.stack([s.entropy_sum for s in stats]),
        )

    def hidden(self, tokens_BT: Tensor, cache: KVCache | None = None) -> Tensor:
        """Final hidden states [B, T, D], after the last norm. With `cache`, the tokens continue what is in it."""
        return self._backbone(tokens_BT, None, self.model.embed_tokens.table(), cache)[0]

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The head alone: [..., D] -> [..., V], for the positions a caller needs."""
        embedding = self.model.embed_tokens
        return linear(embedding.head_input(hidden_ND), embedding.table())

    def new_cache(self, rows: int, capacity: int, padding: list[int] | None = None) -> KVCache:
        """An empty key-value cache on this model's device; `padding`: columns of left padding of each row."""
        device = self.model.embed_tokens.weight.device
        return KVCache(self.config, rows, capacity, self.compute_dtype, device, padding)

    def _backbone(
        self,
        tokens_BT: Tensor,
        document_BT: Tensor | None,
        table_VD: Tensor,
        cache: KVCache | None = None,
        lengths: Lengths | None = None,
    ) -> tuple[Tensor, list[RouterStats]]:
        x_BTD = self.model.embed_tokens.lookup(tokens_BT, table_VD).to(self.compute_dtype)
        columns, device = tokens_BT.shape[1], tokens_BT.device
        seen: Seen = None
        if cache is not None:
            positions, seen = cache.positions(columns, device), cache.mask(columns, device)
        else:
            # Rotation is relative, so positions need not restart at a document's start.
            positions = torch.arange(columns, device=device)
        if lengths is not None and attends_by_lengths(x_BTD):
            seen = lengths
        elif document_BT is not None:
            seen = document_mask(document_BT, self.compute_dtype)
        rope = rope_table(self.config, positions)
        all_stats = []
        for index, layer in enumerate(self.model.layers):
            append = None if cache is None else functools.partial(cache.append, index)
            if self.recompute and torch.is_grad_enabled():
                # Statistics are what the first pass returns: the second one's are thrown away, so nothing counts twice.
                x_BTD, stats = checkpoint(layer, x_BTD, rope, seen, use_reentrant=False, preserve_rng_state=False)
            else:
                x_BTD, stats = layer(x_BTD, rope, seen, append)
            if stats is not None:
                all_stats.append(stats)
        if cache is not None:
            cache.advance(columns)
        return self.model.norm(x_BTD), all_stats

    def moe_layers(self) -> list[MoELayer]:
        """The mixture layers, first to last; none in a dense network."""
        layers = (layer.feed_forward for layer in self.model.layers)
        return [layer for layer in layers if isinstance(layer, MoELayer)]

    def init_weights(self, seed: int) -> None:
        """Fresh values that depend on `seed` and tensor names alone (mm_train.weights.initial)."""
        fill(self, self.config, initial(self.config, seed))
