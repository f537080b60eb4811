import dataclasses
import json

import pytest
import torch

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.engine import PlainEngine
from mm_train.export.__main__ import main
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.release import load_release


@pytest.fixture
def run(small_config, tmp_path, byte_tokenizer):
    """A function that makes a run folder with one checkpoint, of the given quantisation."""

    def make(**quant):
        cfg = dataclasses.replace(small_config, quant=config.Quant(**quant))
        model = MobileMoE(cfg.model)
        model.init_weights(0)
        writer = Writer(tmp_path / "run", Groups(), cfg)
        writer.save(7, PlainEngine(model, cfg.optim), {"samples": 0})
        writer.wait()
        byte_tokenizer.save(tmp_path / "run")
        return tmp_path / "run"

    return make


def test_post_training_quantisation_says_so(run, tmp_path, capsys):
    assert main(["--checkpoint", str(run()), "--out", str(tmp_path / "out")]) == 0
    assert "quantised after training" in capsys.readouterr().out
    facts = json.loads((tmp_path / "out/config.json").read_text())["mobilemoe_train"]
    assert facts == {"name": "small", "stage": "pretrain", "step": 7, "quantisation": "post-training quantisation"}
    assert (tmp_path / "out/tokenizer.json").exists()


def test_quantisation_aware_checkpoint_exports_what_it_trained_with(run, tmp_path, capsys):
    folder = run(enabled=True)
    assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 0
    assert "after training" not in capsys.readouterr().out
    from mm_train.model_folder import load_model

    tokens = torch.randint(0, 300, (1, 20))
    trained = load_model(folder)
    for module in trained.modules():  # the release holds weights only: leave activations alone in both
        if getattr(module, "fake_quant", None):
            module.fake_quant = dataclasses.replace(module.fake_quant, activations_int8=False)
    torch.testing.assert_close(load_release(tmp_path / "out")(tokens), trained(tokens), rtol=1e-5, atol=1e-5)


def test_bf16_keeps_the_weights(run, tmp_path):
    assert main(["--checkpoint", str(run()), "--out", str(tmp_path / "out"), "--format", "bf16"]) == 0
    assert "quantization" not in json.loads((tmp_path / "out/config.json").read_text())


def test_experts_trained_for_another_axis_are_refused(run, tmp_path, capsys):
    folder = run(enabled=True, expert_group_axis="in")
    assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "quant.expert_group_axis=in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "out"), "--requantise"]) == 0
    assert "quantised a second time, along another axis: relative error 0.0" in capsys.readouterr().out


def test_nothing_to_export_and_nowhere_to_write(run, tmp_path, capsys):
    assert main(["--checkpoint", str(tmp_path / "none"), "--out", str(tmp_path / "out")]) == 2
    assert "no checkpoint in" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["--checkpoint", str(run()), "--out", str(tmp_path / "file" / "out")]) == 2
    assert "cannot write the release" in capsys.readouterr().err
