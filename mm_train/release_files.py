"""The weight files of a release folder: one safetensors file, or several behind an index. Nothing in them is trusted.

Headers are read and checked before any tensor is, so a folder that does not fit costs no memory.
"""

import json
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mm_train.cli import UserError
from mm_train.files import is_file
from mm_train.release_format import INDEX, WEIGHTS, Stored, readable_dtypes

MAX_JSON_BYTES = 100 << 20  # safetensors' own limit for a header


class Found(NamedTuple):
    """What a header says of a tensor."""

    file: str
    dtype: str
    shape: tuple[int, ...]


class WeightFiles:
    """Tensors of a folder by name. Raises UserError for files that are missing, damaged or contradict their index."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.tensors: dict[str, Found] = {}
        self._opened: dict[str, Any] = {}
        index = None if is_file(folder / WEIGHTS) else _read_index(folder)
        for file in [WEIGHTS] if index is None else sorted(set(index.values())):
            for name, dtype, shape in read_header(folder / file):
                if index is not None and index.get(name) != file:
                    where = f"puts it into {index[name]}" if name in index else "does not know it"
                    raise UserError(f"{folder / file} holds tensor {name}, but {INDEX} {where}")
                self.tensors[name] = Found(file, dtype, shape)
        for name, file in (index or {}).items():
            if name not in self.tensors:
                raise UserError(f"{folder / INDEX} puts tensor {name} into {file}, which does not hold it")

    def check(self, expected: Stored) -> str:
        """The name under which the folder holds `expected`.

        Raises UserError that names the tensor when it is missing or has another dtype or shape.
        """
        # Other writers may put `.weight` behind the expert tensors.
        names = (expected.name, expected.name + ".weight") if expected.name.endswith("_proj") else (expected.name,)
        name = next((name for name in names if name in self.tensors), None)
        if name is None:
            raise UserError(f"{self.folder}: tensor {expected.name} is missing")
        _, dtype, shape = self.tensors[name]
        if shape != expected.shape:
            raise UserError(f"{self.folder}: tensor {name} has shape {shape}; this model has {expected.shape}")
        wanted = readable_dtypes(expected)
        if dtype not in wanted:
            raise UserError(f"{self.folder}: tensor {name} has dtype {dtype}; it must be {' or '.join(wanted)}")
        return name

    def read(self, name: str) -> Tensor:
        """A tensor as stored. Raises UserError when it holds NaN or infinity, or cannot be read."""
        file = self.tensors[name].file
        try:
            if file not in self._opened:
                self._opened[file] = safe_open(self.folder / file, "pt")
            tensor = self._opened[file].get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{self.folder / file} is damaged: {error}") from None
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise UserError(f"{self.folder}: tensor {name} holds NaN or infinity")
        return tensor

    def close(self) -> None:
        """Unmap the files: what was read of them stays in memory no longer than its tensors do."""
        self._opened.clear()


def _read_index(folder: Path) -> dict[str, str]:
    """Tensor name -> file name of a sharded release. File names may not lead out of the folder."""
    path = folder / INDEX
    if not is_file(path):
        raise UserError(f"{folder} has no {WEIGHTS} and no {INDEX}")
    files = read_json(path).get("weight_map")
    if not isinstance(files, dict) or not files:
        raise UserError(f"{path}: weight_map is {files!r:.60}; it must map tensor names to files")
    for name, file in files.items():
        if not isinstance(file, str) or file != Path(file).name or "\\" in file or not file.endswith(".safetensors"):
            raise UserError(f"{path}: file {file!r:.80} of tensor {name} must be the plain name of a .safetensors file")
        if not is_file(folder / file):
            raise UserError(f"{path} names {file:.80}, which is not in the folder")
    return files


def read_header(path: Path) -> list[tuple[str, str, tuple[int, ...]]]:
    """Name, dtype and shape of every tensor of a safetensors file, which is checked for completeness."""
    try:
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if length > MAX_JSON_BYTES:
                raise UserError(f"{path} is damaged: its header claims {length:,} bytes")
            header = parse_json(file.read(length), path)
        with safe_open(path, "pt"):  # offsets, dtypes and the length of the file
            pass
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} is damaged: {getattr(error, 'strerror', None) or error}") from None
    header.pop("__metadata__", None)
    return [(name, facts["dtype"], tuple(facts["shape"])) for name, facts in header.items()]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises UserError when it is missing, too long, or not one, or says a key twice."""
    try:
        if not path.exists():
            raise UserError(f"{path} not found")
        if path.stat().st_size > MAX_JSON_BYTES:
            raise UserError(f"{path} is too long ({path.stat().st_size:,} bytes) to be what its name says")
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror or error}") from None
    return parse_json(data, path)


def parse_json(data: bytes, path: Path) -> dict[str, Any]:
    """A JSON object; strict where readers differ: a key said twice and NaN are refused."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values = dict(pairs)
        if len(values) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"the key {twice!r:.80} occurs twice")
        return values

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    try:
        values = json.loads(data, object_pairs_hook=unique, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not valid JSON for this purpose: {values!r:.60} is not an object")
    return values
