import dataclasses
import json
import os

import pytest
import torch

from mm_train import checkpoint
from mm_train.cli import UserError
from mm_train.engine import PlainEngine
from mm_train.model import MobileMoE
from mm_train.parallel import Groups

FACTS = {"samples": 30, "data_fingerprint": "f"}


@pytest.fixture
def engine(small_config):
    """An engine with moments that are not zero."""
    model = MobileMoE(small_config.model)
    model.init_weights(0)
    engine = PlainEngine(model, small_config.optim)
    for _ in range(2):
        model(torch.randint(0, 512, (2, 16))).square().mean().backward()
        engine.step(1e-3)
    for layer in model.moe_layers():
        layer.expert_bias += 0.25
    return engine


@pytest.fixture
def saved(engine, small_config, tmp_path):
    return checkpoint.save(tmp_path, 3, engine, Groups(), small_config, FACTS)


def test_everything_comes_back_bit_for_bit(engine, saved, small_config):
    state = torch.get_rng_state()
    torch.rand(5)
    fresh = PlainEngine(MobileMoE(small_config.model), small_config.optim)
    checkpoint.restore(checkpoint.Reader(saved), fresh, Groups())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in engine.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value), name
    for ours, want in zip(fresh.model.parameters(), engine.model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fresh.optimizer.state[ours][key], engine.optimizer.state[want][key])
            assert fresh.optimizer.state[ours][key].any()
        assert fresh.optimizer.state[ours]["step"] == 3


def test_any_range_of_experts_can_be_read(engine, saved):
    reader = checkpoint.Reader(saved)
    name = "model.layers.1.feed_forward.experts.down_proj"
    whole = dict(engine.model.named_parameters())[name]
    for experts in (range(8), range(2, 5), range(7, 8)):
        assert torch.equal(reader.read(name, "weight", experts), whole[experts.start : experts.stop])


def test_an_expert_that_nobody_stored_is_missed(saved):
    manifest = json.loads((saved / "manifest.json").read_text())
    for part in manifest["files"][0]["parts"]:
        if part["experts"]:
            part["experts"] = [0, 4]
    (saved / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"holds 4 of the 8 experts of model.layers.0.feed_forward.experts.gate_up_proj"
    ):
        checkpoint.Reader(saved).read("model.layers.0.feed_forward.experts.gate_up_proj")


def test_latest_is_the_newest_complete_one_and_old_ones_go(engine, small_config, tmp_path):
    small_config.checkpoint.keep = 2
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step, engine, Groups(), small_config, FACTS)
    root = tmp_path / "checkpoints"
    assert sorted(p.name for p in root.iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert checkpoint.latest(tmp_path) == root / "step-00000003"


def test_a_run_that_was_rolled_back_keeps_what_it_saves(engine, small_config, tmp_path):
    small_config.checkpoint.keep = 2
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, step * 100, engine, Groups(), small_config, FACTS)
    (tmp_path / "checkpoints/latest").write_text("step-00000200\n")
    checkpoint.save(tmp_path, 250, engine, Groups(), small_config, FACTS)
    left = sorted(p.name for p in (tmp_path / "checkpoints").glob("step-*"))
    assert left == ["step-00000200", "step-00000250"]
    assert checkpoint.latest(tmp_path).name == "step-00000250"


@pytest.mark.parametrize("moment", [1, 2])
def test_a_kill_between_the_renames_leaves_a_usable_latest(engine, saved, small_config, tmp_path, monkeypatch, moment):
    calls = []

    def killed(source, target):
        calls.append(target)
        if len(calls) == moment:
            raise KeyboardInterrupt  # as good as a kill: nothing after it runs
        os.rename(source, target)

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(tmp_path, 9, engine, Groups(), small_config, FACTS)
    monkeypatch.undo()
    checkpoint.Reader(checkpoint.latest(tmp_path)).weights()
    assert checkpoint.latest(tmp_path) == saved
    checkpoint.save(tmp_path, 9, engine, Groups(), small_config, FACTS)
    assert checkpoint.latest(tmp_path).name == "step-00000009"


def test_a_torn_write_is_never_chosen_and_is_swept_away(engine, saved, small_config, tmp_path):
    torn = tmp_path / "checkpoints" / "step-00000009.partial"
    torn.mkdir()
    (torn / "rank-00000.safetensors").write_bytes(b"half")
    assert checkpoint.latest(tmp_path) == saved
    checkpoint.save(tmp_path, 4, engine, Groups(), small_config, FACTS)
    assert not torn.exists()


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_is_named(saved, damage):
    file = saved / "rank-00000.safetensors"
    content = bytearray(file.read_bytes())
    if damage == "remove":
        file.unlink()
    else:
        content[len(content) // 2] ^= 1
        file.write_bytes(content if damage == "flip" else content[:-10])
    with pytest.raises(UserError, match=r"checkpoint file .*rank-00000.safetensors"):
        checkpoint.Reader(saved).weights()


def test_a_damaged_manifest_is_named(saved):
    (saved / "manifest.json").write_text('{"format": ')
    with pytest.raises(UserError, match=r"cannot read checkpoint manifest .*manifest.json"):
        checkpoint.Reader(saved)


def test_another_model_and_other_data_are_refused(saved, small_config):
    reader = checkpoint.Reader(saved)
    other = dataclasses.replace(small_config.model, num_experts_per_tok=4)
    with pytest.raises(UserError, match=r"of another model: model.num_experts_per_tok is 2 there and 4 here"):
        reader.check_model(other)
    checkpoint.check_data(reader, "f", 10)
    with pytest.raises(UserError, match="trained on other data"):
        checkpoint.check_data(reader, "g", 10)
    with pytest.raises(UserError, match=r"had 10 rows a step, now 20"):
        checkpoint.check_data(reader, "f", 20)


def test_an_unwritable_place_is_one_clear_error(engine, small_config, tmp_path):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step-00000001"):
        checkpoint.save(tmp_path, 1, engine, Groups(), small_config, FACTS)


def test_no_checkpoint_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match="no checkpoint in"):
        checkpoint.find(tmp_path)
