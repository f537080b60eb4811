"""Write a network as one GGUF file, tensor by tensor; nothing larger than one tensor is ever in memory."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.source import ExportSource
from mm_train.gguf import layout
from mm_train.gguf.layout import ARCHITECTURE, Tensor
from mm_train.gguf.q4_0 import blocks
from mm_train.gguf.read import library
from mm_train.tokenizer import CHAT_TEMPLATE, Tokenizer

MOSTLY_Q4_0, ALL_F32 = 2, 0  # llama.cpp's file types
QUANTISATION_VERSION = 2
NORMAL, CONTROL, UNUSED = 1, 3, 5  # llama.cpp's token types


def write(
    path: Path,
    source: ExportSource,
    tokenizer: Tokenizer,
    facts: dict[str, str],
    *,
    as_float32: bool = False,
    progress: Callable[[int], object] = lambda size: None,
) -> None:
    """Write `path`; `facts` go under "general.". `progress` is called with the bytes of each tensor written.

    Raises UserError for a network that llama.cpp has not, and without the package gguf; OSError where it cannot write.
    """
    gguf = library()
    model = source.shape
    tensors = [t._replace(quantised=t.quantised and not as_float32) for t in layout.tensors(model)]
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    try:
        for key, value in facts.items():
            writer.add_string(f"general.{key}", value)
        writer.add_string("general.type", "model")
        writer.add_uint32("general.file_type", ALL_F32 if as_float32 else MOSTLY_Q4_0)
        writer.add_uint32("general.quantization_version", QUANTISATION_VERSION)
        for key, number in layout.values(model).items():
            _add(writer, f"{ARCHITECTURE}.{key}", number)
        for flag, number in layout.rope_flags(model).items():
            writer.add_float32(f"mobilemoe.{flag}", number)
        _add_tokenizer(writer, tokenizer, model)
        kind = gguf.GGMLQuantizationType
        for tensor in tensors:
            if tensor.quantised:
                stored = (*tensor.shape[:-1], tensor.shape[-1] // layout.BLOCK * layout.BLOCK_BYTES)
                writer.add_tensor_info(tensor.name, stored, np.dtype(np.uint8), tensor.bytes, kind.Q4_0)
            else:
                writer.add_tensor_info(tensor.name, tensor.shape, np.dtype(np.float32), tensor.bytes)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for tensor in tensors:
            try:
                writer.write_tensor_data(_encode(tensor, source))
            except OSError as error:  # numpy says how much it wrote, and not why it was no more
                if error.errno is None:
                    raise OSError(f"the file stopped growing within {tensor.name}: is the disk full?") from None
                raise
            progress(tensor.bytes)
    finally:
        writer.close()


def _add(writer: Any, key: str, value: int | float | bool | str) -> None:
    """One key, in the type that llama.cpp reads."""
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}
    kinds[type(value)](key, value)


def _encode(tensor: Tensor, source: ExportSource) -> np.ndarray:
    """A tensor's bytes as numpy has them."""
    if not tensor.source:
        return np.ones(tensor.shape, np.float32)
    if not tensor.quantised:
        values = source.read(tensor.source)
        if not torch.isfinite(values).all():
            raise UserError(f"tensor {tensor.source} holds NaN or infinity: there is nothing to export")
        return _viewed(values, tensor, source.shape).contiguous().numpy()
    int4 = source.int4(tensor.source, -2 if tensor.view == "experts" else -1)
    codes, scales = (_viewed(part, tensor, source.shape) for part in int4)
    return blocks(codes, scales)


def _viewed(values: torch.Tensor, tensor: Tensor, model: config.Model) -> torch.Tensor:
    """Values, codes or scales in the order of the file."""
    if tensor.view == "experts":
        return values.transpose(1, 2)
    return rope_order(values, model.head_dim) if tensor.view == "heads" else values


def rope_order(rows: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Rows of every head: first the even ones, then the odd ones."""
    return rows.unflatten(0, (-1, head_dim // 2, 2)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, tokenizer: Tokenizer, model: config.Model) -> None:
    """Vocabulary, merges, control tokens and chat template; rows of the embedding beyond the vocabulary are unused."""
    tokens, is_control, merges = tokenizer.tables()
    if not merges:
        raise UserError("the tokenizer has no merges: llama.cpp does not load a vocabulary of single bytes")
    spare = [f"[unused{index}]" for index in range(model.vocab_size - len(tokens))]
    writer.add_string("tokenizer.ggml.model", "gpt2")  # llama.cpp's name for byte-level BPE
    writer.add_string("tokenizer.ggml.pre", "llama-bpe")  # the same words before the merges as ours
    writer.add_token_list([*tokens, *spare])
    writer.add_token_types([*(CONTROL if control else NORMAL for control in is_control), *([UNUSED] * len(spare))])
    writer.add_token_merges(merges)
    writer.add_bos_token_id(tokenizer.bos_id)
    writer.add_eos_token_id(tokenizer.eos_id)
    writer.add_eot_token_id(tokenizer.eot_id)
    writer.add_pad_token_id(tokenizer.pad_id)
    writer.add_add_bos_token(True)
    writer.add_chat_template(CHAT_TEMPLATE)


def expected_bytes(model: config.Model) -> int:
    """Bytes of the tensors of a Q4_0 file, each padded to llama.cpp's alignment of 32."""
    return sum(math.ceil(tensor.bytes / 32) * 32 for tensor in layout.tensors(model))
