"""Every range, what fits together, and what is checked when: the rules alone (test_config.py has those of files)."""

import dataclasses
import math
from pathlib import Path

import pytest
import torch

from mm_train import config, rules
from mm_train.cli import UserError
from mm_train.model import MobileMoE, rope_table

ROOT = Path(__file__).parents[2]


def section_of(cfg: config.Config, path: str):
    """(object, key) of a dotted path, with RoPE scaling switched on."""
    cfg.model.rope_scaling = cfg.model.rope_scaling or config.RopeScaling()
    *parents, key = path.split(".")
    values = cfg
    for name in parents:
        values = getattr(values, name)
    return values, key


def test_every_number_has_a_range():
    cfg = config.Config()
    sections = {name: getattr(cfg, name) for name in ("model", "data", "train", "optim", "moe", "parallel")}
    sections |= {
        "checkpoint": cfg.checkpoint,
        "evaluate": cfg.evaluate,
        "faults": cfg.faults,
        "log": cfg.log,
        "model.rope_scaling": config.RopeScaling(),
    }
    numbers = {
        f"{name}.{field.name}"
        for name, values in sections.items()
        for field in dataclasses.fields(values)
        if type(getattr(values, field.name)) in (int, float)
    }
    assert numbers - set(rules.CHOICES) == set(rules.RANGES)


@pytest.mark.parametrize("path", rules.RANGES)
def test_a_value_out_of_range_is_refused_with_its_bounds(path):
    limits = rules.RANGES[path]
    wrong = [-1, -math.inf, math.inf, math.nan, 10**400, -(10**400), 10**5000, limits.high * 1.001 + 1]
    for value in wrong + [limits.low] * limits.above:
        cfg = config.Config()
        values, key = section_of(cfg, path)
        setattr(values, key, value)
        with pytest.raises(UserError, match=rf"{path} is .*; it must be (above|at least) .* and at most "):
            rules.validate_training(cfg)


def test_messages_name_value_and_bounds():
    for path, value, message in (
        (
            "model.num_hidden_layers",
            10**8,
            "model.num_hidden_layers is 100000000; it must be above 0 and at most 1,024",
        ),
        ("model.vocab_size", 2**25, "model.vocab_size is 33554432; it must be above 0 and at most 16,777,216"),
        ("model.num_local_experts", -4, "model.num_local_experts is -4; it must be at least 0 and at most 65,536"),
        ("model.rms_norm_eps", 0.5, "model.rms_norm_eps is 0.5; it must be at least 1e-12 and at most 0.1"),
        ("train.tokens", 10**400, "train.tokens is a whole number of 1,329 bits; it must be at least 0"),
        ("moe.dispatch", "drop", "moe.dispatch is 'drop'; it must be one of dropless, drop_and_pad"),
    ):
        cfg = config.Config()
        values, key = section_of(cfg, path)
        setattr(values, key, value)
        with pytest.raises(UserError) as error:
            rules.validate_training(cfg)
        assert str(error.value).startswith(message)


@pytest.mark.parametrize("high", [False, True], ids=["lowest", "highest"])
def test_the_network_is_finite_at_the_ends_of_the_ranges(high, small_model):
    def end(path: str) -> float:
        limits = rules.RANGES[path]
        return limits.high if high else limits.low * 1.001 if limits.above and limits.low else limits.low or 1e-300

    keys = ("factor", "low_freq_factor", "high_freq_factor")
    scaling = config.RopeScaling(**{key: end(f"model.rope_scaling.{key}") for key in keys})
    floats = {key: end(f"model.{key}") for key in ("rope_theta", "rms_norm_eps", "routed_scaling_factor")}
    model = dataclasses.replace(small_model, rope_scaling=scaling, **floats)
    rules.validate_model(model)
    assert rope_table(model, torch.arange(256)).isfinite().all()
    network = MobileMoE(model)
    network.init_weights(0)
    with torch.no_grad():
        network.model.embed_tokens.weight[0] = 0  # a row that norms divide by rms_norm_eps alone
    tokens = torch.tensor([[0, 0, 1, 2]])
    losses = network(tokens, tokens, torch.zeros_like(tokens))
    losses.cross_entropy_sum.backward()
    assert losses.cross_entropy_sum.isfinite()
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_a_network_needs_no_stage_and_training_it_no_run():
    cfg = config.Config()
    cfg.data.mixture = {}
    rules.validate_training(cfg)
    with pytest.raises(UserError, match=r"how long the stage is, is not said: set train.tokens, or train.epochs"):
        rules.validate_stage(cfg)
    cfg.train.tokens, cfg.train.global_batch_tokens = 1_000_000, 1_000_001
    with pytest.raises(UserError, match=r"train.tokens \(1000000\) is less than one batch"):
        rules.validate_stage(cfg)
    cfg.train.global_batch_tokens = 4096
    cfg.train.epochs = 2
    with pytest.raises(UserError, match=r"train.tokens \(1000000\) and train.epochs \(2\) are both set"):
        rules.validate_stage(cfg)
    cfg.train.epochs = 0
    rules.validate_stage(cfg)
    with pytest.raises(UserError, match=r"data.mixture is empty"):
        rules.validate(cfg)


@pytest.mark.parametrize(
    ("section", "key", "value", "message"),
    [
        ("model", "num_experts_per_tok", 1, "the router learns nothing: set model.norm_topk_prob=false"),
        ("model", "num_experts_per_tok", 0, "a token needs an expert"),
        ("model", "intermediate_size", 0, "an expert needs a width"),
        ("model", "head_dim", 33, "must be even"),
        ("parallel", "expert_parallel", 3, r"\(3\) must divide model.num_local_experts \(16\)"),
        ("optim", "betas", (0.9, 1.0), r"optim.betas \(0.9, 1.0\) must lie in \[0, 1\)"),
        ("optim", "name", "sgd", "optim.name is 'sgd'; it must be one of adamw, muon"),
        (
            "optim",
            "no_decay",
            ["norms", "head"],
            "optim.no_decay names head; parts of a network are embedding, attention",
        ),
        ("data", "mixture", {"a": 1e300}, "or one above 1e\\+09"),
        ("train", "seed", 2**31, r"must be below 2\^31"),
    ],
)
def test_what_does_not_fit_together_is_refused(section, key, value, message):
    cfg = config.Config()
    rules.validate_training(cfg)
    setattr(getattr(cfg, section), key, value)
    with pytest.raises(UserError, match=message):
        rules.validate_training(cfg)


@pytest.mark.parametrize(("key", "value"), [("decay_fraction", 0.95), ("decay_steps", 95), ("decay_steps", 200)])
def test_warm_up_and_decay_fit_into_the_stage(key, value):
    cfg = config.Config(train=config.Train(tokens=100_000, global_batch_tokens=1000))
    cfg.optim = config.Optim(schedule="wsd", warmup_steps=10)
    rules.validate_stage(cfg)
    setattr(cfg.optim, key, value)
    with pytest.raises(
        UserError, match=rf"optim.{key} \({value}\) and optim.warmup_steps \(10\) do not fit into .* 100"
    ):
        rules.validate_stage(cfg)


def test_a_dense_network_has_no_experts_to_share_out():
    cfg = config.Config()
    cfg.model.num_local_experts = cfg.model.num_experts_per_tok = 0
    rules.validate_training(cfg)
    cfg.parallel.expert_parallel = 2
    with pytest.raises(UserError, match=r"a dense network .* has no experts to share out"):
        rules.validate_training(cfg)


def test_the_softmax_ablation_changes_the_router_alone():
    s, softmax = (
        config.load_words([str(ROOT / f"configs/model/{name}.yaml")], lambda c: rules.validate_model(c.model)).model
        for name in ("s", "s-softmax")
    )
    assert dataclasses.replace(softmax, name=s.name, scoring_func="sigmoid") == s


def test_words_are_files_and_overrides_in_any_order():
    tiny, stage = str(ROOT / "configs/model/tiny.yaml"), str(ROOT / "configs/stage/tiny/pretrain.yaml")
    cfg = config.load_words([tiny, "optim.lr=0.5", stage, "run.dir=runs/x"])
    assert cfg == config.load([tiny, stage], ["optim.lr=0.5", "run.dir=runs/x"])
    with pytest.raises(UserError, match=r"run.dir is empty"):  # the whole run is checked unless asked otherwise
        config.load_words([tiny, stage])
