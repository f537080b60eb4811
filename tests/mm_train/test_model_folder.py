import dataclasses
from pathlib import Path

import pytest
import torch

from mm_train import checkpoint, config
from mm_train.cli import UserError
from mm_train.export import export
from mm_train.model import MobileMoE
from mm_train.model_folder import check_same_tokenizer, find_tokenizer, load_model, load_weights
from mm_train.tokenizer import Tokenizer, load_tokenizer
from mm_train.train import train

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
    return {"run": root / "run", "checkpoint": checkpoint.find(root / "run"), "release": root / "release"}


@torch.no_grad()
def test_every_kind_of_folder_is_the_same_model(folders):
    logits = {kind: load_model(folder)(TOKENS_BT) for kind, folder in folders.items()}
    assert torch.equal(logits["run"], logits["checkpoint"])
    # The release computes with float activations, the checkpoint as in training, with int8 ones.
    assert (logits["release"] - logits["run"]).abs().max() < 0.2 * logits["run"].std()


def test_what_was_trained_with_quantisation_keeps_its_full_weights(folders):
    assert {p.dtype for p in load_model(folders["run"], torch.bfloat16).parameters()} == {torch.float32}
    assert torch.bfloat16 in {p.dtype for p in load_model(folders["release"], torch.bfloat16).parameters()}


def test_weights_start_a_new_stage_of_the_same_network_only(folders, small_model):
    model = MobileMoE(small_model)
    load_weights(model, folders["run"])
    stored = checkpoint.Reader(folders["checkpoint"])
    for name, value in model.state_dict().items():
        assert torch.equal(value, stored.read(name)), name
    with pytest.raises(UserError, match=r"another model: model.routed_scaling_factor is 2.5 there and 1.0 here"):
        load_weights(MobileMoE(dataclasses.replace(small_model, routed_scaling_factor=1.0)), folders["release"])


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
    for function in (load_model, find_tokenizer):
        with pytest.raises(UserError, match=r"not found|no checkpoint in|has no tokenizer.json"):
            function(tmp_path / name)
