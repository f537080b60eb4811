"""Release folders, as the published checkpoints have them: written from a model, and read into one.

save_release(model, "out/", format="int4", tokenizer=load_tokenizer("data/quickstart"))
model = load_release("out/")
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from mm_train import config, hf, inventory, model_card, release_format
from mm_train.cli import UserError
from mm_train.files import publish, sync
from mm_train.model import MobileMoE
from mm_train.quant import codes_of, dequantise, pack, quantise, unpack
from mm_train.release_files import WeightFiles, read_json
from mm_train.release_format import FORMATS, INDEX, MARK, METADATA, WEIGHTS, Stored, stored_tensors
from mm_train.tokenizer import Tokenizer

MAX_SHARD_BYTES = 5 * 10**9  # longer weights are split; int4 of every published size stays one file
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}


def save_release(
    model: MobileMoE,
    path: str | Path,
    format: str = "bf16",
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    **facts: object,
) -> list[Path]:
    """Write a release folder and return its weight files. The folder appears whole or not at all.

    `format` is "bf16" or "int4"; weights of more than `max_shard_bytes` become several files with an index. `facts` of
    where the weights come from go into the model card (mm_train.model_card), single values into config.json too.
    Raises UserError for another format, non-finite weights or an existing non-release folder at `path`.
    """
    if format not in FORMATS:
        raise UserError(f"unknown release format {format!r}; it must be bf16 or int4")
    path = Path(path)
    if path.exists() and not _is_ours(path):
        raise UserError(f"{path} exists and was not written by this project: choose another place, or remove it")
    partial, old = path.with_name(path.name + ".partial"), path.with_name(path.name + ".old")
    try:
        for leftover in (partial, old):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        files = _write_weights(model, format, partial, max_shard_bytes)
        single = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
        values = release_format.release_config(model.config, format, single) | {"auto_map": hf.AUTO_MAP}
        if tokenizer is not None:
            ids = hf.generation_config(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id)
            values |= {key: ids[key] for key in ("bos_token_id", "eos_token_id")}
            _write_json(partial / "generation_config.json", ids)
            tokenizer.save(partial)
        _write_json(partial / "config.json", values)
        for code in hf.code_files():
            shutil.copyfile(code, partial / code.name)
        facts |= {"weight_bytes": sum((partial / file).stat().st_size for file in files)}
        (partial / "README.md").write_text(model_card.render(model.config, format, facts), encoding="utf-8")
        if path.exists():
            os.replace(path, old)
        publish(partial, path)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write the release to {path}: {getattr(error, 'strerror', None) or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return [path / file for file in files]


def _is_ours(path: Path) -> bool:
    """Is this an empty folder or a release that this project wrote, so that it may be replaced?"""
    if not path.is_dir():
        return False
    try:
        return not any(path.iterdir()) or MARK in json.loads((path / "config.json").read_text())
    except (OSError, ValueError, TypeError):
        return False


def _write_weights(model: MobileMoE, format: str, folder: Path, max_shard_bytes: int) -> list[str]:
    """Write the tensors, one file's worth in memory at a time; returns the names of the files."""
    state = dict(model.state_dict())
    shards = _split(stored_tensors(model.config, format), max_shard_bytes)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors: dict[str, Tensor] = {}
        for source, stored in groupby(shard, key=lambda s: s.source):
            tensors |= _encode(state[source], list(stored), model.int4_scales.get(source))
        save_file(tensors, folder / file, metadata=METADATA)
        sync(folder / file)
        files.append(file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(stored.bytes for stored in shard)
    if len(files) > 1:
        _write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})
    return files


def _split(tensors: Iterable[Stored], max_bytes: int) -> list[list[Stored]]:
    """Tensors in files of at most `max_bytes`, unless one alone is longer; codes and scales stay together."""
    shards: list[list[Stored]] = [[]]
    room = max_bytes
    for _, group in groupby(tensors, key=lambda stored: stored.source):
        together = list(group)
        size = sum(stored.bytes for stored in together)
        if size > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1] += together
        room -= size
    return shards


def _encode(tensor: Tensor, stored: list[Stored], scales: Tensor | None) -> dict[str, Tensor]:
    """One tensor of the network as it is stored. `scales`: those of the int4 release that the network came from."""
    if stored[0].role == "plain":
        value = tensor.detach().to("cpu", DTYPES[stored[0].dtype]).contiguous()
        if not torch.isfinite(value).all():
            raise UserError(f"tensor {stored[0].name} holds NaN or infinity: there is nothing to release")
        return {stored[0].name: value}
    weight = tensor.detach().cpu()
    codes = None if scales is None else codes_of(weight, scales)
    if codes is None or scales is None:
        codes, scales = quantise(weight)
    values = {"codes": pack(codes), "scales": scales}
    return {s.name: values[s.role].contiguous() for s in stored}


def _write_json(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    sync(path)


def load_release(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MobileMoE:
    """Model of a release folder, bf16 or int4 (dequantised), in eval mode; see `build` for `dtype`.

    Raises UserError for a missing or unreadable file, a tensor that is missing, unknown or of the wrong dtype, shape
    or value, another network and another quantisation format.
    """
    path = Path(path)
    if not (path / "config.json").is_file():
        raise UserError(f"not a release folder: {path / 'config.json'} not found")
    values = read_json(path / "config.json")
    int4 = release_format.check_quantization(values, path / "config.json")
    shape = release_format.model_config(values, path / "config.json")
    files = WeightFiles(path)
    names = {stored: files.check(stored) for stored in stored_tensors(shape, "int4" if int4 else "bf16")}
    unknown = sorted(files.tensors.keys() - names.values())
    if unknown:
        raise UserError(f"{path}: unknown tensor {unknown[0]}")
    scales: dict[str, Tensor] = {}
    model = build(shape, _decoded(files, names, scales), dtype, device)
    if dtype == torch.float32:
        model.int4_scales = scales
    return model


def _decoded(
    files: WeightFiles, names: Mapping[Stored, str], scales: dict[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors by name, int4 ones as float32 values; `scales` collects their scales."""
    for source, group in groupby(names, key=lambda stored: stored.source):
        parts = {stored.role: files.read(names[stored]) for stored in group}
        if "plain" in parts:
            yield source, parts["plain"]
            continue
        if (parts["scales"] < 0).any():
            raise UserError(f"{files.folder}: the scales of {source} are negative in places")
        scales[source] = parts["scales"]
        yield source, dequantise(unpack(parts["codes"]), parts["scales"])


def build(
    shape: config.Model, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str | torch.device
) -> MobileMoE:
    """A model in eval mode out of its tensors, taken one by one: there is never a second copy of the whole.

    Matrices are kept in `dtype`, router, norms and bias in float32. Activations are `dtype` on a GPU and float32 on a
    CPU, where 16 bits save reading time (kernels.linear) and arithmetic is fastest in float32. Raises UserError for a
    tensor that is missing, unknown or of the wrong shape.
    """
    missing = {entry.name: entry.shape for entry in inventory.tensors(shape)}
    with torch.device("meta"):
        model = MobileMoE(shape, torch.float32 if torch.device(device).type == "cpu" else dtype)
    for name, tensor in tensors:
        if name not in missing:
            raise UserError(f"unknown tensor {name}: {shape.name} has none of this name, or it came twice")
        if tensor.shape != missing[name]:
            raise UserError(f"tensor {name} has shape {tuple(tensor.shape)}; {shape.name} has {missing[name]}")
        del missing[name]
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf == "expert_bias":
            module.register_buffer(leaf, tensor.to(device, torch.float32))
            continue
        if tensor.ndim < 2 or owner.endswith("router"):
            tensor = tensor.float()
        elif tensor.ndim == 3 and dtype != torch.float32:
            # Transposed in memory: a few rows, or a GPU's grouped matmul, then read contiguous inputs of an output.
            tensor = tensor.to(dtype).transpose(1, 2).contiguous().transpose(1, 2)
        else:
            tensor = tensor.to(dtype)
        module.register_parameter(leaf, nn.Parameter(tensor.to(device)))
    if missing:
        raise UserError(f"tensor {next(iter(missing))} of {shape.name} is missing")
    return model.eval()
