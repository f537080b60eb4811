"""Release folders, as the published checkpoints have them: written from a model, and read into one.

save_release(model, "out/", format="int4", tokenizer=load_tokenizer("data/quickstart"))
model = load_release("out/")
"""

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from mm_train import config, hf, inventory, model_card, release_format
from mm_train.cli import UserError
from mm_train.files import sync
from mm_train.model import MobileMoE
from mm_train.output_folder import SUMS, output_folder, write_sums
from mm_train.quant import codes_of, dequantise, pack, quantise, unpack
from mm_train.release_files import WeightFiles, read_json
from mm_train.release_format import FORMATS, INDEX, MARK, WEIGHTS, Stored, file_layout, stored_tensors
from mm_train.tokenizer import Tokenizer, check_vocabulary

MAX_SHARD_BYTES = 5 * 10**9  # longer weights are split; int4 of every published size stays one file
DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16}
# Names of what a release folder of ours can hold (Python leaves __pycache__ when transformers runs the code).
OWN_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|model\.safetensors\.index)\.json|README\.md|__pycache__"
    rf"|{SUMS}"
    r"|(configuration|modeling)_mobilemoe\.py|model(-\d{5}-of-\d{5})?\.safetensors"
)


class Weights(Protocol):
    """Where the tensors of a release come from, one at a time."""

    @property
    def shape(self) -> config.Model: ...

    def read(self, name: str) -> Tensor:
        """Values of a tensor of the network, on the CPU."""

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """int8 codes and fp16 scales, groups along the last dimension."""


class ModelWeights:
    """Those of a model in memory."""

    def __init__(self, model: MobileMoE) -> None:
        self.shape = model.config
        self._state, self._scales = dict(model.state_dict()), model.int4_scales

    def read(self, name: str) -> Tensor:
        return self._state[name].detach().cpu()

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """Those of the int4 release that the model was loaded from, unless its values have changed since."""
        weight, scales = self.read(name), self._scales.get(name)
        codes = None if scales is None else codes_of(weight, scales)
        return quantise(weight) if codes is None or scales is None else (codes, scales)


def save_release(
    model: MobileMoE,
    path: str | Path,
    format: str = "bf16",
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: Mapping[str, Any] | None = None,
) -> list[Path]:
    """`write_release` of a model in memory.

    One that was loaded from an int4 release and not changed since keeps that release's codes and scales.
    """
    return write_release(ModelWeights(model), path, format, tokenizer, max_shard_bytes, facts)


def write_release(
    weights: Weights,
    path: str | Path,
    format: str = "bf16",
    tokenizer: Tokenizer | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    facts: Mapping[str, Any] | None = None,
    progress: Callable[[int], object] = lambda size: None,
) -> list[Path]:
    """Write a release folder and return its weight files. The folder appears whole or not at all.

    `format` is "bf16" or "int4"; weights of more than `max_shard_bytes` become several files with an index. `facts` of
    where the weights come from go into the model card (mm_train.model_card), single values into config.json too.
    Tensors are written one by one: never more than one is in memory. `progress` hears of the bytes of each.
    Raises UserError for another format, non-finite weights, a tokenizer with more tokens than the model, and where
    `path` holds anything but an earlier release of this project.
    """
    if format not in FORMATS:
        raise UserError(f"unknown release format {format!r}; it must be bf16 or int4")
    path = Path(path).resolve()
    if tokenizer is not None:
        check_vocabulary(tokenizer, weights.shape)
    with output_folder(path, _foreign, "the release") as folder:
        files = _write_folder(weights, folder, format, tokenizer, max_shard_bytes, dict(facts or {}), progress)
        write_sums(folder)
    return [path / file for file in files]


def _foreign(path: Path) -> Path | None:
    """The first thing at `path` that is not part of a release which this project wrote, and so may not be replaced."""
    if not path.is_dir():
        return path if path.exists() else None
    names = {entry.name for entry in path.iterdir()}
    unknown = sorted(name for name in names if not OWN_FILES.fullmatch(name))
    if unknown:
        return path / unknown[0]
    try:
        return None if not names or MARK in json.loads((path / "config.json").read_text()) else path
    except (OSError, ValueError, TypeError):
        return path


def _write_folder(
    weights: Weights,
    folder: Path,
    format: str,
    tokenizer: Tokenizer | None,
    max_shard_bytes: int,
    facts: dict[str, Any],
    progress: Callable[[int], object],
) -> list[str]:
    """Everything that a release holds; returns the names of the weight files."""
    files = _write_weights(weights, format, folder, max_shard_bytes, progress)
    single = {name: value for name, value in facts.items() if isinstance(value, str | int | float)}
    values = release_format.release_config(weights.shape, format, single) | {"auto_map": hf.AUTO_MAP}
    if tokenizer is not None:
        ids = hf.generation_config(tokenizer.bos_id, tokenizer.stop_ids, tokenizer.pad_id)
        values |= {key: ids[key] for key in ("bos_token_id", "eos_token_id")}
        _write_json(folder / "generation_config.json", ids)
        tokenizer.save(folder)
    _write_json(folder / "config.json", values)
    for code in hf.code_files():
        shutil.copyfile(code, folder / code.name)
    facts["weight_bytes"] = sum((folder / file).stat().st_size for file in files)
    (folder / "README.md").write_text(model_card.render(weights.shape, format, facts), encoding="utf-8")
    return files


def _write_weights(
    weights: Weights, format: str, folder: Path, max_shard_bytes: int, progress: Callable[[int], object]
) -> list[str]:
    """Write the tensors; returns the names of the files."""
    shards = _split(stored_tensors(weights.shape, format), max_shard_bytes)
    files: list[str] = []
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = WEIGHTS if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        head, places = file_layout(shard)
        with (folder / file).open("wb") as out:
            out.write(head)
            for source, stored in groupby(shard, key=lambda s: s.source):
                for name, tensor in _encode(weights, source, list(stored)).items():
                    out.seek(places[name])
                    out.write(tensor.view(torch.uint8).flatten().numpy().data)
                    progress(tensor.nbytes)
        sync(folder / file)
        files.append(file)
        weight_map |= dict.fromkeys(places, file)
    if len(files) > 1:
        total = sum(stored.bytes for shard in shards for stored in shard)
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


def _encode(weights: Weights, source: str, stored: list[Stored]) -> dict[str, Tensor]:
    """One tensor of the network as it is stored."""
    if stored[0].role == "plain":
        value = weights.read(source).to(DTYPES[stored[0].dtype]).contiguous()
        if not torch.isfinite(value).all():
            raise UserError(f"tensor {stored[0].name} holds NaN or infinity: there is nothing to release")
        return {stored[0].name: value}
    codes, scales = weights.codes(source)
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
    release = Release(Path(path))
    scales: dict[str, Tensor] = {}
    model = build(release.shape, _decoded(release, scales), dtype, device)
    model.int4_scales = scales
    return model


def _decoded(release: "Release", scales: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The network's tensors by name, int4 ones as float32 values; `scales` collects their scales."""
    for name in release.stored:
        values, of_tensor = release.read(name)
        if of_tensor is not None:
            scales[name] = of_tensor
        yield name, values


class Release:
    """A release folder whose config and headers are in order, to read single tensors of. Raises UserError."""

    def __init__(self, path: Path) -> None:
        values = read_json(path / "config.json")
        int4 = self.int4 = release_format.check_quantization(values, path / "config.json")
        self.path = path
        self.shape = release_format.model_config(values, path / "config.json", int4)
        self._files = WeightFiles(path)
        self.stored: dict[str, dict[str, str]] = {}  # tensor of the network -> role -> name in the files
        for stored in stored_tensors(self.shape, "int4" if int4 else "bf16"):
            self.stored.setdefault(stored.source, {})[stored.role] = self._files.check(stored)
        known = {name for roles in self.stored.values() for name in roles.values()}
        unknown = sorted(self._files.tensors.keys() - known)
        if unknown:
            raise UserError(f"{path}: unknown tensor {unknown[0]}")

    def read(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor | None]:
        """`rows` of a tensor as they are stored, or dequantised to float32 together with their scales."""
        if "plain" in self.stored[name]:
            return self._files.read(self.stored[name]["plain"])[rows], None
        codes, scales = self.codes(name, rows)
        return dequantise(codes, scales), scales

    def close(self) -> None:
        """Let go of the files until the next read."""
        self._files.close()

    def codes(self, name: str, rows: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """int8 codes and fp16 scales of `rows` of an int4 tensor, groups along the last dimension."""
        packed, scales = (self._files.read(self.stored[name][role])[rows] for role in ("codes", "scales"))
        if (scales < 0).any():
            raise UserError(f"{self.path}: the scales of {name} are negative in places")
        return unpack(packed), scales


def build(
    shape: config.Model, tensors: Iterable[tuple[str, Tensor]], dtype: torch.dtype, device: str | torch.device
) -> MobileMoE:
    """A model in eval mode out of its tensors, taken one by one: there is never a second copy of the whole.

    Matrices are kept in `dtype` (float32, bfloat16, float16), router, norms and bias in float32. Activations are
    `dtype` on a GPU. On a CPU they are float32, for arithmetic is fastest in it; where few rows meet 16-bit matrices,
    the products are taken in 16 bits, which saves reading time (kernels.linear). Raises UserError for another dtype
    and for a tensor that is missing, unknown or of the wrong shape.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise UserError(f"a model is kept in float32, bfloat16 or float16, not {dtype}")
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
