"""Weights of a release, run or checkpoint folder as an export wants them: one tensor at a time, int4 or floats."""

from pathlib import Path

import torch
from torch import Tensor

from mm_train import config
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.reader import Reader
from mm_train.cli import UserError
from mm_train.files import is_file, is_folder
from mm_train.quant import dequantise, quantise
from mm_train.release import Release
from mm_train.rules import validate_model
from mm_train.sharding import ALONE, local_boxes
from mm_train.weights import initial

SLICE = 1 << 24  # elements that are quantised at a time


class ExportSource:
    """An opened folder.

    `expert_axis` says along what the experts' groups were trained: "out", "in", or None where nothing was trained for
    int4. `errors` collects what asking for groups along another axis has cost: relative error by tensor.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError when the folder holds no model, or a damaged one."""
        if not is_folder(path):
            raise UserError(f"model folder not found: {path}")
        self.path = path
        self.errors: dict[str, float] = {}
        self._release: Release | None = None
        self.expert_axis: str | None = None
        if is_file(path / "config.json"):
            release = self._release = Release(path)
            self.shape = release.shape
            self.expert_axis = "out" if release.int4 else None
            self._read = self._read_release
        else:
            reader = Reader(find(path)).verify()
            self.shape = reader.model_config
            self.expert_axis = reader.run_config.quant.expert_group_axis if reader.run_config.quant.enabled else None
            self._read = lambda name: reader.read(name, "weight")

    @classmethod
    def random(cls, path: Path, seed: int = 0) -> "ExportSource":
        """Fresh weights of a model file, to measure speed and size with. Raises UserError for one that cannot be."""
        source = cls.__new__(cls)
        source.path, source.errors, source._release, source.expert_axis = path, {}, None, None
        source.shape = config.load([path], check=lambda cfg: validate_model(cfg.model)).model
        fresh, boxes = initial(source.shape, seed), {entry.name: box for entry, box in local_boxes(source.shape, ALONE)}
        source._read = lambda name: fresh(name, boxes[name])
        return source

    def read(self, name: str) -> Tensor:
        """Values in float32; those of an int4 release are q * scale."""
        return self._read(name)

    def _read_release(self, name: str) -> Tensor:
        """A tensor of a release. Its files are closed after each: pages of a mapped file count as memory in use."""
        assert self._release is not None
        values = self._release.read(name)[0].float()
        self._release.close()
        return values

    def is_int4(self, name: str) -> bool:
        """Is a tensor of an int4 release on the grid?"""
        return self._release is not None and "codes" in self._release.stored[name]

    def codes(self, name: str) -> tuple[Tensor, Tensor]:
        """`int4` as a release wants it: groups along the last dimension."""
        return self.int4(name, -1)

    def int4(self, name: str, axis: int) -> tuple[Tensor, Tensor]:
        """int8 codes and fp16 scales of a tensor, groups along `axis` (-1 or -2).

        Those of an int4 release are passed on untouched; those of quantisation-aware training are what it computed
        with, by the same function of the same float32 values.
        """
        trained_axis = -2 if ".experts." in name and self.expert_axis == "in" else -1
        if self._release is not None and self._release.int4 and axis == trained_axis:
            stored = self._release.codes(name)
            self._release.close()
            return stored
        values = self.read(name)
        if self.expert_axis is None or axis == trained_axis:
            try:
                return _quantise(values, axis)
            except UserError as error:
                raise UserError(f"{self.path}, {name}: {error}") from None
        on_grid = dequantise(*quantise(values, trained_axis), trained_axis)
        codes, scales = quantise(on_grid, axis)
        self.errors[name] = float((dequantise(codes, scales, axis) - on_grid).norm() / on_grid.norm())
        return codes, scales


def _quantise(values: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """mm_train.quant.quantise of a large tensor, a few rows or experts at a time: it needs three times its input."""
    rows = max(1, SLICE * values.shape[0] // max(values.numel(), 1))
    parts = [quantise(part, axis) for part in values.split(rows)]
    return torch.cat([codes for codes, _ in parts]), torch.cat([scales for _, scales in parts])
