"""Causal attention inside the documents of packed rows, by their lengths: no mask of T x T is made or kept.

Shapes: B rows, T tokens of a row, N = B * T, H heads, C head width.
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
