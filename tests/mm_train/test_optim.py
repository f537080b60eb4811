import itertools
import math

import pytest
import torch

from mm_train import config
from mm_train.model import MobileMoE
from mm_train.optim import learning_rate, parameter_groups, update_expert_bias


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
