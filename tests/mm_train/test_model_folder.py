import shutil
from pathlib import Path

import pytest
import torch

from mm_train import config
from mm_train.checkpoint.folders import find
from mm_train.cli import UserError
from mm_train.export.__main__ import export
from mm_train.model import MobileMoE
from mm_train.model_folder import check_same_tokenizer, find_tokenizer, load_model, weight_source
from mm_train.parallel.groups import Groups
from mm_train.release import save_release
from mm_train.sharding import Place, local_boxes
from mm_train.tokenizer import Tokenizer, load_tokenizer
from mm_train.train import train
from mm_train.weights import fill

TOKENS_BT = torch.arange(24).view(2, 12)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, small_model, data_set) -> dict[str, Path]:
    """A run of quantisation-aware training, its checkpoint, and its release."""
    root = tmp_path_factory.mktemp("folders")
    cfg = config.Config(model=small_model, quant=config.Quant(enabled=True))
    cfg.data = config.Data(path=str(data_set), mixture={"code": 1}, seq_len=64)
    cfg.train = config.Train(tokens=2 * 512, global_batch_tokens=512, micro_batch_size=2)
    cfg.optim, cfg.log = config.Optim(lr=1e-3, warmup_steps=1), config.Log(wandb="disabled")
    cfg.run = config.Run(dir=str(root / "run"), stage="qat")
    train(cfg)
    export(root / "run", root / "release", "int4")
    return {"run": root / "run", "checkpoint": find(root / "run"), "release": root / "release"}


@torch.no_grad()
def test_every_kind_of_folder_is_the_same_model(folders):
    logits = {kind: load_model(folder)(TOKENS_BT) for kind, folder in folders.items()}
    assert torch.equal(logits["run"], logits["checkpoint"])
    # The release computes with float activations, the checkpoint as in training, with int8 ones.
    assert (logits["release"] - logits["run"]).abs().max() < 0.2 * logits["run"].std()


def test_what_was_trained_with_quantisation_keeps_its_full_weights(folders):
    assert {p.dtype for p in load_model(folders["run"], torch.bfloat16).parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in load_model(folders["release"], torch.bfloat16).parameters()}


def test_single_weights_of_every_kind_of_folder_are_those_of_its_model(folders, small_model):
    for folder in folders.values():
        want = load_model(folder).state_dict()
        shape, read = weight_source(folder)
        assert config.model_difference(shape, small_model) is None
        for entry, box in local_boxes(small_model, Place(ep_rank=1, ep_size=4, tp_rank=1, tp_size=2)):
            for values, expected in (
                (read(entry.name), want[entry.name]),
                (read(entry.name, box), want[entry.name][box.slices]),
            ):
                assert torch.equal(values, expected), entry.name
                assert values.dtype == torch.float32


def test_a_release_in_16_bits_is_a_source_too(folders, small_model, tmp_path):
    save_release(load_model(folders["run"]), tmp_path / "bf16", "bf16")
    want = load_model(tmp_path / "bf16").state_dict()
    _, read = weight_source(tmp_path / "bf16")
    model = MobileMoE(small_model)
    fill(model, small_model, read)
    assert all(torch.equal(value, want[name]) for name, value in model.state_dict().items())


def test_a_source_names_what_it_does_not_have(folders):
    for folder in folders.values():
        with pytest.raises(UserError, match=r"has no tensor model\.nothing"):
            weight_source(folder)[1]("model.nothing", None)


def test_damaged_weights_are_never_loaded(folders, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folders["checkpoint"], copy)
    (file,) = copy.glob("rank-*")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    for function in (load_model, weight_source, lambda path: weight_source(path, Groups())):
        with pytest.raises(UserError, match=r"copy is damaged: rank-00000\.safetensors: its sha256 is not the one"):
            function(copy)


def test_the_tokenizer_is_found_and_compared(folders, byte_tokenizer, data_set):
    for folder in folders.values():
        assert load_tokenizer(find_tokenizer(folder)).sha256 == byte_tokenizer.sha256
    check_same_tokenizer(folders["release"], byte_tokenizer, data_set)
    other = Tokenizer(byte_tokenizer._json + b"\n")  # the same vocabulary in other bytes
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        check_same_tokenizer(folders["release"], other, data_set)


@pytest.mark.parametrize("name", ["nowhere", "empty", "x" * 300])
def test_a_folder_without_a_model_is_refused(name, tmp_path):
    (tmp_path / "empty").mkdir()
    for function in (load_model, weight_source, find_tokenizer):
        with pytest.raises(UserError, match=r"not found|no checkpoint in|has no tokenizer.json"):
            function(tmp_path / name)
