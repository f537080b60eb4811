import itertools
import math

import pytest
import torch

from mm_train import config
from mm_train.engine import PlainEngine
from mm_train.model import MobileMoE
from mm_train.optim import clip, gradient_norms, learning_rate, parameter_groups, update_expert_bias
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
    assert all(p.ndim >= 2 for p in groups[0]["params"])
    assert groups[1]["weight_decay"] == 0
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))


def test_norms_by_part_are_torchs_and_clipping_scales_all_of_it(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    engine = PlainEngine(model, config.Optim())
    tokens = torch.randint(0, 512, (2, 20))
    model(tokens, tokens).cross_entropy_sum.backward()
    norms = gradient_norms(engine, Groups())
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert norms["total"] == pytest.approx(float(torch.nn.utils.get_total_norm(gradients.values())), rel=1e-6)
    router = [g for name, g in gradients.items() if "router" in name]
    assert norms["router"] == pytest.approx(float(torch.nn.utils.get_total_norm(router)), rel=1e-6)
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
