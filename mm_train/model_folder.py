"""A model and its tokenizer from any folder that holds them: a release, a run (its latest checkpoint), a checkpoint."""

from pathlib import Path

import torch
from torch import Tensor

from mm_train import config
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.reader import Reader
from mm_train.cli import UserError
from mm_train.files import is_file, is_folder
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.quant import FakeQuant, enable_fake_quant
from mm_train.release import Release, build, load_release
from mm_train.sharding import Box
from mm_train.tokenizer import Tokenizer, load_tokenizer
from mm_train.weights import Source


def load_model(path: str | Path, dtype: torch.dtype = torch.float32, device: str | torch.device = "cpu") -> MobileMoE:
    """Model in eval mode; see mm_train.release.build for `dtype`.

    A checkpoint of quantisation-aware training computes as in training, with fake-quantised weights and activations,
    and keeps its matrices in float32. Raises UserError when the folder holds no model or a damaged one.
    """
    path = Path(path)
    if not is_folder(path):
        raise UserError(f"model folder not found: {path}")
    if is_file(path / "config.json"):
        return load_release(path, dtype, device)
    reader = Reader(find(path)).verify()
    quant = reader.run_config.quant
    tensors = ((name, reader.read(name)) for name in reader.names())
    model = build(reader.model_config, tensors, torch.float32 if quant.enabled else dtype, device)
    if quant.enabled:
        enable_fake_quant(model, FakeQuant.of(quant))
    return model


def weight_source(path: str | Path, groups: Groups | None = None) -> tuple[config.Model, Source]:
    """The network of a release, run or checkpoint folder, and a function that reads its weights one by one.

    `read(name, box=None)` returns a tensor, or a block of it, in float32 on the CPU; no model is built. Ranks that all
    pass their `groups` share out the hashing of a checkpoint's files. Raises UserError, on every rank then, when the
    folder holds no model or a damaged one.
    """
    path = Path(path)
    if not is_folder(path):
        raise UserError(f"model folder not found: {path}")
    if not is_file(path / "config.json"):
        reader = Reader(find(path)).verify(groups)
        return reader.model_config, lambda name, box=None: reader.read(name, "weight", box)
    release = Release(path)

    def read(name: str, box: Box | None = None) -> Tensor:
        if name not in release.stored:
            raise UserError(f"{path} has no tensor {name}")
        if box is None:
            return release.read(name)[0].float()
        rows, *rest = box.slices
        return release.read(name, rows)[0][(slice(None), *rest)].float().contiguous()

    return release.shape, read


def find_tokenizer(path: str | Path) -> Path:
    """Folder of the tokenizer of a release, run or checkpoint folder. Raises UserError when there is none."""
    path = Path(path)
    if not is_folder(path):
        raise UserError(f"model folder not found: {path}")
    for folder in (path, path.parent.parent):  # a checkpoint lies two levels below its run
        if is_file(folder / "tokenizer.json"):
            return folder
    raise UserError(f"{path} has no tokenizer.json")


def check_same_tokenizer(model_folder: Path, tokenizer: Tokenizer, data_folder: str | Path) -> None:
    """Raise UserError when a model folder and a data set have different tokenizers: its weights would mean nothing."""
    theirs = load_tokenizer(find_tokenizer(model_folder)).sha256
    if theirs != tokenizer.sha256:
        raise UserError(
            f"{model_folder} was trained with another tokenizer ({theirs[:12]}) than {data_folder} has"
            f" ({tokenizer.sha256[:12]}): use the data set it was trained on, or train it anew"
        )
