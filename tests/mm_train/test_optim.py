import dataclasses
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_train import config
from mm_train.cli import UserError
from mm_train.engine import PlainEngine
from mm_train.inventory import parameters
from mm_train.model import MobileMoE
from mm_train.optim import (
    clip,
    gradient_norms,
    learning_rate,
    parameter_groups,
    schedule_change,
    update_expert_bias,
)
from mm_train.optim_groups import Group, table
from mm_train.parallel.groups import Groups


def test_warm_up_then_cosine_down_to_the_floor():
    optim = config.Optim(lr=1.0, min_lr_ratio=0.1, warmup_steps=10)
    rates = [learning_rate(step, 110, optim) for step in range(110)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[60] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))
    assert rates[10] == 1.0
    assert 0.1 < rates[-1] < 0.101
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))


def test_linear_and_constant():
    linear = config.Optim(lr=1.0, schedule="linear", min_lr_ratio=0.0, warmup_steps=0)
    assert [learning_rate(s, 4, linear) for s in range(4)] == pytest.approx([1, 0.75, 0.5, 0.25])
    constant = config.Optim(lr=1.0, schedule="constant", warmup_steps=0)
    assert [learning_rate(s, 4, constant) for s in range(4)] == [1.0] * 4


def test_bias_moves_against_the_load_by_the_rate():
    biases = [torch.zeros(4), torch.zeros(4)]
    update_expert_bias(biases, torch.tensor([[4, 0, 2, 2], [1, 1, 1, 1]]), 0.001)
    torch.testing.assert_close(biases[0], torch.tensor([-0.001, 0.001, 0.0, 0.0]))
    assert not biases[1].any()


def test_only_matrices_decay_and_no_parameter_is_lost(small_model):
    model = MobileMoE(small_model)
    groups = parameter_groups(model, config.Optim(weight_decay=0.1))
    matrices, vectors = ([p for p in model.parameters() if (p.ndim >= 2) is wide] for wide in (True, False))
    assert [group["weight_decay"] for group in groups] == [0.1, 0]
    for group, want in zip(groups, (matrices, vectors), strict=True):
        assert [id(p) for p in group["params"]] == [id(p) for p in want]


def test_parts_are_left_out_of_weight_decay_by_name(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    decayed, kept = parameter_groups(model, config.Optim(no_decay=["embedding", "routed experts", "router"]))[::-1]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("experts." in (n := names[id(p)]) or "router" in n or "embed" in n for p in kept["params"])
    assert sum("norm" in names[id(p)] for p in decayed["params"]) == 5  # as it was told
    start = {name: p.detach().clone() for name, p in model.named_parameters()}
    engine = PlainEngine(model, config.Optim(lr=0.1, no_decay=["norms", "router"]))
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    engine.step(0.1)
    for name, p in model.named_parameters():
        factor = 1 if "norm" in name or "router" in name else 0.99
        torch.testing.assert_close(p, start[name] * factor, msg=name)


def test_norms_by_part_are_torchs_and_clipping_scales_all_of_it(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    engine = PlainEngine(model, config.Optim())
    tokens = torch.randint(0, 512, (2, 20))
    model(tokens, tokens).cross_entropy_sum.backward()
    norms = gradient_norms(engine, Groups())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert norms["total"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients.values())), rel=3e-6)
    router = [g for name, g in gradients.items() if "router" in name]
    assert norms["router"] == pytest.approx(float(torch.nn.utils.get_total_norm(router)), rel=3e-6)
    assert math.sqrt(sum(n**2 for part, n in norms.items() if part != "total")) == pytest.approx(norms["total"])

    clip(engine, norms["total"], 2 * norms["total"])
    clip(engine, norms["total"], 0)
    assert all(torch.equal(p.grad, gradients[name]) for name, p in model.named_parameters())
    clip(engine, norms["total"], 0.5)
    assert gradient_norms(engine, Groups())["total"] == pytest.approx(0.5, rel=1e-6)


def test_gradients_that_are_not_finite_have_a_norm_that_is_not(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    engine = PlainEngine(model, config.Optim())
    tokens = torch.randint(0, 512, (2, 20))
    model(tokens, tokens).cross_entropy_sum.backward()
    model.moe_layers()[1].experts.down_proj.grad[3, 2, 1] = math.nan
    norms = gradient_norms(engine, Groups())
    assert math.isnan(norms["total"])
    assert math.isnan(norms["routed experts"])
    assert math.isfinite(norms["attention"])
    engine.discard()
    assert gradient_norms(engine, Groups())["total"] == 0


def test_wsd_stays_and_then_decays():
    linear = config.Optim(lr=1.0, schedule="wsd", warmup_steps=2, decay_steps=4, decay_shape="linear", min_lr_ratio=0.2)
    want = [0.5, 1, 1, 1, 1, 1, 1, 0.8, 0.6, 0.4]
    assert [learning_rate(step, 10, linear) for step in range(10)] == pytest.approx(want)
    sqrt = dataclasses.replace(linear, decay_shape="1-sqrt", min_lr_ratio=0.0)
    assert [learning_rate(step, 10, sqrt) for step in range(6, 10)] == pytest.approx(
        [1, 0.5, 1 - 0.5**0.5, 1 - 0.75**0.5]
    )
    fraction = dataclasses.replace(linear, decay_steps=0, decay_fraction=0.25)
    assert [fraction.decay_from(total) for total in (10, 12, 1000)] == [7, 9, 750]
    none = dataclasses.replace(fraction, decay_fraction=0.0)
    assert [learning_rate(step, 4, none) for step in range(4)] == [0.5, 1, 1, 1]


@given(
    total=st.integers(2, 400),
    longer=st.integers(0, 400),
    fraction=st.floats(0, 1),
    shape=st.sampled_from(["1-sqrt", "linear"]),
    floor=st.floats(0, 1),
)
def test_the_stable_part_of_wsd_does_not_depend_on_the_length_of_the_stage(total, longer, fraction, shape, floor):
    optim = config.Optim(
        lr=1.0, schedule="wsd", warmup_steps=0, decay_fraction=fraction, decay_shape=shape, min_lr_ratio=floor
    )
    rates = [learning_rate(step, total, optim) for step in range(total)]
    assert all(a >= b >= floor for a, b in itertools.pairwise(rates))
    start, later = optim.decay_from(total), optim.decay_from(total + longer)
    assert 0 <= start <= later
    assert rates[: start + 1] == [learning_rate(step, total + longer, optim) for step in range(min(start + 1, total))]


def with_steps(steps: int, **optim) -> config.Config:
    train = config.Train(tokens=steps * 100, global_batch_tokens=100)
    return config.Config(train=train, optim=config.Optim(lr=1.0, warmup_steps=2, **optim))


def test_a_longer_stage_goes_on_before_the_decay_of_wsd_and_not_after(tmp_path):
    before, longer = (with_steps(steps, schedule="wsd", decay_steps=4) for steps in (20, 40))
    for step in (0, 5, 16):
        assert schedule_change(step, before, longer, tmp_path) is None
    with pytest.raises(UserError, match=r"lies in the decay .* began after step 16 of 20: .*\(2000 there, 4000 here\)"):
        schedule_change(17, before, longer, tmp_path)
    assert schedule_change(17, before, before, tmp_path) is None
    assert "it has 1" in str(schedule_change(10, with_steps(20), longer, tmp_path))
    assert "had the rate 0.628; it has 0.905" in str(schedule_change(10, with_steps(20), with_steps(40), tmp_path))


def test_the_groups_that_are_said_are_those_that_are_used(small_model):
    for optim in (config.Optim(), config.Optim(name="muon"), config.Optim(no_decay=["norms", "embedding", "router"])):
        groups = parameter_groups(MobileMoE(small_model), optim)
        used = {g["name"]: sum(p.numel() for p in g["params"]) for g in groups}
        rows = table(small_model, optim)
        assert {Group(r["algorithm"], r["weight_decay"]).name: r["parameters"] for r in rows} == used
        assert {part for row in rows for part in row["parts"]} == set(parameters(small_model))
