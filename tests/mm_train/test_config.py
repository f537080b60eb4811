import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from mm_train import config
from mm_train.cli import UserError

ROOT = Path(__file__).parents[2]
TINY = [ROOT / "configs/model/tiny.yaml", ROOT / "configs/stage/tiny/pretrain.yaml"]


def load(*overrides, files=TINY):
    return config.load(files, ["run.dir=runs/x", *overrides])


def test_files_merge_left_to_right_and_overrides_come_last(tmp_path):
    (tmp_path / "more.yaml").write_text("optim: {lr: 1.0e-4}\ndata: {mixture: {code: 1}}\n")
    cfg = load("optim.lr=3e-4", files=[*TINY, tmp_path / "more.yaml"])
    assert cfg.optim.lr == 3e-4
    assert cfg.data.mixture == {"code": 1.0}  # replaced, not merged
    assert cfg.model.name == "tiny"


def test_overrides_add_to_the_mixture_of_the_files():
    assert load("data.mixture.code=3", "data.mixture.chat=1").data.mixture == {"code": 3, "docs": 40, "chat": 1}


def test_saved_config_reads_back_equal(tmp_path):
    cfg = load("model.rope_scaling.factor=8", "parallel.expert_parallel=2")
    config.save(cfg, tmp_path / "config.yaml")
    assert config.load([tmp_path / "config.yaml"]) == cfg
    assert config.from_dict(dataclasses.asdict(cfg), "test") == cfg


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optim.lrr=1", r"unknown key optim.lrr \(did you mean optim.lr\?\)"),
        ("optmi.lr=1", r"unknown key optmi \(did you mean optim\?\)"),
        ("model.rope_scaling.fctor=1", r"unknown key model.rope_scaling.fctor"),
        ("optim.lr=-0.001", r"optim.lr is -0.001; it must be above 0"),
        ("optim.lr=fast", r"optim.lr: Value 'fast'"),
        ("optim=3", r"optim"),
        ("nonsense", r"not of the form key.sub=value"),
        ("parallel.expert_parallel=4 model.num_local_experts=6", r"expert_parallel \(4\) must divide .* \(6\)"),
        ("data.seq_len=4096", r"data.seq_len \(4096\) must not exceed model.max_position_embeddings \(1024\)"),
        ("train.global_batch_tokens=5000", r"global_batch_tokens \(5000\) must be a multiple of .* = 2048"),
        ("train.tokens=100", r"train.tokens \(100\) is less than one batch"),
        ("optim.warmup_steps=100000", r"warmup_steps \(100000\) must be below"),
        ("moe.dispatch=drop", r"moe.dispatch is 'drop'; it must be one of dropless, drop_and_pad"),
        ("model.hidden_size=100", r"model.hidden_size \(100\) must be a multiple of 32"),
        ("model.num_key_value_heads=3", r"num_key_value_heads \(3\) must divide"),
        ("model.num_experts_per_tok=99", r"num_experts_per_tok \(99\) must not exceed"),
        ("parallel.zero_stage=3", r"parallel.zero_stage is 3; it must be one of 0, 1, 2"),
        ("model.num_attention_heads=3 model.num_key_value_heads=3 model.head_dim=16", r"\(48\) must be a multiple"),
        ("optim.betas=[0.9", r"override 'optim.betas=\[0.9' is not readable"),
        ("run.dir=${oops}", r"run.dir"),
        ("train.seed=99999999999", r"train.seed \(99999999999\) must be below"),
        ("data.mixture.code=.inf", r"negative or infinite weight"),
        ("model.rope_scaling.factor=0", r"rope_scaling.factor is 0.0; it must be above 0"),
        ("model.rope_scaling.rope_type=yarn", r"rope_type is .yarn.; it must be .llama3"),
        ("run.dir=''", r"run.dir is empty"),
        ("model.rope_theta=1" + "0" * 400, r"a number is too large"),
        ("data.mixture.code=-1", r"negative or infinite weight"),
    ],
)
def test_bad_values_are_refused_with_their_numbers(override, message):
    with pytest.raises(UserError, match=message):
        load(*override.split())


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"config file not found: .*none.yaml"):
        load(files=[tmp_path / "none.yaml"])
    (tmp_path / "torn.yaml").write_text("a: [1\n")
    with pytest.raises(UserError, match=r"torn.yaml is not readable YAML"):
        load(files=[tmp_path / "torn.yaml"])
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(UserError, match=r"list.yaml: the file must be a mapping"):
        load(files=[tmp_path / "list.yaml"])


@pytest.mark.parametrize("size", ["s", "m", "l"])
@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "qat"])
def test_every_size_has_every_stage(size, stage):
    cfg = load(files=[ROOT / f"configs/model/{size}.yaml", ROOT / f"configs/stage/{stage}.yaml"])
    assert cfg.run.stage == stage
    assert sum(cfg.data.mixture.values()) == pytest.approx(100)


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "qat"])
def test_tiny_has_every_stage(stage):
    assert load(files=[TINY[0], ROOT / f"configs/stage/tiny/{stage}.yaml"]).run.stage == stage


def test_loading_a_config_needs_no_torch():
    code = "import sys, mm_train.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
