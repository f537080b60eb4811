"""Causal attention inside the documents of packed rows, by their lengths: no mask of T x T is made or kept; and that
of rows which begin alike, whose beginning is kept once.

Shapes: B rows, T tokens of a row, N = B * T, H heads, G key-value heads, C head width, S columns of a row's own that it
may see, P columns that all rows begin with.
"""

import inspect
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.backend import use_triton


class Lengths(NamedTuple):
    """Where the documents of a batch are in its N tokens, laid end to end; none reaches into the next row."""

    cu_seqlens: Tensor  # int32: first token of each, and N; entries that repeat are documents without tokens
    max_seqlen: int  # at least the longest


def attends_by_lengths(x: Tensor) -> bool:
    """Whether `document_attention` is the fast way here: flash attention takes 16 bits on CUDA."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and use_triton(x)


def document_attention(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, lengths: Lengths) -> Tensor:
    """out_NHC: every token attends to the tokens of its document up to itself. Scale 1 / sqrt(C). Differentiable."""
    if not attends_by_lengths(q_NHC):
        return document_attention_reference(q_NHC, k_NHC, v_NHC, lengths)
    from torch.nn.attention.varlen import varlen_attn

    # How to say "causal" has changed since torch 2.10.
    said_by_window = "window_size" in inspect.signature(varlen_attn).parameters
    causal: dict[str, Any] = {"window_size": (-1, 0)} if said_by_window else {"is_causal": True}
    ends, longest = lengths
    out = varlen_attn(q_NHC, k_NHC, v_NHC, ends, ends, longest, longest, **causal)
    assert isinstance(out, Tensor)  # a tuple only where more is asked for
    return out


def document_attention_reference(q_NHC: Tensor, k_NHC: Tensor, v_NHC: Tensor, lengths: Lengths) -> Tensor:
    """The same, one document after the other."""
    sizes = lengths.cu_seqlens.diff().tolist()
    outputs = []
    for parts in zip(*(tensor.split(sizes) for tensor in (q_NHC, k_NHC, v_NHC)), strict=True):
        q_HTC, k_HTC, v_HTC = (part.transpose(0, 1) for part in parts)
        outputs.append(F.scaled_dot_product_attention(q_HTC, k_HTC, v_HTC, is_causal=True).transpose(0, 1))
    return torch.cat(outputs)


def attention_after_prefix(
    q_BHTC: Tensor, k_BGSC: Tensor, v_BGSC: Tensor, k_1GPC: Tensor, v_1GPC: Tensor, mask: Tensor | None
) -> Tensor:
    """out_BHTC of rows that see all of a prefix, and of their own columns what `mask` [1 or B, 1, T, S] lets them.

    The mask is bool or 0 and -inf; None: all before them, the new T columns being the last of S. One new column, as in
    decoding, reads the prefix once for all rows; for more of them it is copied to every row. No gradient.
    """
    columns, prefix = q_BHTC.shape[2], k_1GPC.shape[2]
    if columns > 1:
        if mask is None:
            place_S = torch.arange(k_BGSC.shape[2], device=q_BHTC.device)
            mask = (place_S <= place_S[-columns:, None])[None, None]
        mask = F.pad(mask, (prefix, 0), value=True if mask.dtype == torch.bool else 0.0)
        rows = q_BHTC.shape[0]
        k_BGSC, v_BGSC = (
            torch.cat([shared.expand(rows, -1, -1, -1), own], 2) for shared, own in ((k_1GPC, k_BGSC), (v_1GPC, v_BGSC))
        )
        return F.scaled_dot_product_attention(q_BHTC, k_BGSC, v_BGSC, attn_mask=mask, enable_gqa=True)
    q_BGRC = q_BHTC.float().squeeze(2).unflatten(1, (k_BGSC.shape[1], -1)) * q_BHTC.shape[-1] ** -0.5
    own_BGRS = q_BGRC @ k_BGSC.float().transpose(2, 3)
    if mask is not None:
        own_BGRS = own_BGRS.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else own_BGRS + mask
    shared_BGRP = torch.einsum("bgrc,gpc->bgrp", q_BGRC, k_1GPC[0].float())
    weights = torch.cat([shared_BGRP, own_BGRS], -1).softmax(-1)
    out_BGRC = torch.einsum("bgrp,gpc->bgrc", weights[..., :prefix], v_1GPC[0].float())
    out_BGRC = out_BGRC + weights[..., prefix:] @ v_BGSC.float()
    return out_BGRC.flatten(1, 2).unsqueeze(2).to(q_BHTC.dtype)
