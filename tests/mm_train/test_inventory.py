"""The tensor list against the published counts. That it lists the modules' tensors is in test_model.py."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_train import config
from mm_train.inventory import PARTS, active_parameters, parameters, tensors
from mm_train.model import MobileMoE
from mm_train.release_format import file_bytes
from mm_train.rules import validate_model

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # total, active, bytes of the int4 file: arXiv 2605.27358 and the released checkpoints
    "s": (1_263_374_256, 272_469_936, 713_916_240),
    "m": (2_818_390_552, 528_300_568, 1_590_986_088),
    "l": (5_325_704_320, 921_685_120, 3_004_365_448),
}


def load(name: str) -> config.Model:
    return config.load([ROOT / f"configs/model/{name}.yaml"], check=lambda c: validate_model(c.model)).model


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_met_exactly(size):
    model = load(size)
    counts = (sum(parameters(model).values()), sum(active_parameters(model).values()), file_bytes(model, "int4"))
    assert counts == PUBLISHED[size]


def test_parameters_come_in_the_modules_order(small_model):
    """DeepSpeed cuts them in this order (mm_train.memory)."""
    listed = [entry.name for entry in tensors(small_model) if not entry.name.endswith("expert_bias")]
    assert listed == [name for name, _ in MobileMoE(small_model).named_parameters()]


def test_a_token_meets_its_experts_only(small_model):
    total, active = parameters(small_model), active_parameters(small_model)
    assert list(total) == [part for part in PARTS if part in total]
    share = small_model.num_experts_per_tok / small_model.num_local_experts
    assert active["routed experts"] == total["routed experts"] * share
    assert {part for part in total if active[part] != total[part]} == {"routed experts"}


def test_a_dense_network_is_active_as_a_whole():
    model = load("mobilellm-pro")
    assert parameters(model) == active_parameters(model)
    assert sum(parameters(model).values()) == 1_084_453_120
    assert "router" not in parameters(model)


def facts(name: str) -> tuple[config.Model, int, int, int]:
    """(network, all parameters, active ones, bytes in int4)."""
    model = load(name)
    return (
        model,
        sum(parameters(model).values()),
        sum(active_parameters(model).values()),
        file_bytes(model, "int4"),
    )


def test_the_networks_that_s_is_compared_with_are_as_large_as_they_say():
    _, total, active, int4 = facts("s")
    dense, dense_total, dense_active, _ = facts("s-dense")
    assert dense.num_local_experts == 0
    assert dense_total == dense_active == pytest.approx(active, rel=0.005)  # as many active parameters
    memory, _, memory_active, memory_int4 = facts("s-dense-memory")
    assert memory.num_local_experts == 0
    assert memory_int4 == pytest.approx(int4, rel=0.001)  # as many bytes on the device
    assert memory_active > 4.5 * active
    for name in ("s-olmoe", "s-noshared", "s-coarse"):  # as many of both
        _, other_total, other_active, other_int4 = facts(name)
        assert (other_total, other_active) == pytest.approx((total, active), rel=0.005), name
        assert other_int4 == pytest.approx(int4, rel=0.005), name


def test_olmoe_has_the_published_shape():
    """arXiv 2409.02060: 6.92 B and 1.28 B with a head of its own, and 16 x 2 norms of 2048 for queries and keys."""
    model, total, active, _ = facts("olmoe-1b-7b")
    head, norms = 50_304 * 2048, 16 * 2 * 2048
    biases = 64 * 16  # ours; OLMoE balances by a loss
    assert total + head + norms - biases == 6_919_161_856
    assert active + head + norms - biases == pytest.approx(1.28e9, rel=0.005)
    small = load("s-olmoe")
    same = ("num_local_experts", "num_experts_per_tok", "scoring_func", "norm_topk_prob", "routed_scaling_factor")
    assert {key: getattr(small, key) for key in same} == {key: getattr(model, key) for key in same}
    assert small.intermediate_size / small.hidden_size == model.intermediate_size / model.hidden_size


@pytest.mark.parametrize("name", ["s-dense", "s-dense-memory", "s-coarse", "s-noshared", "s-olmoe", "olmoe-1b-7b"])
def test_each_of_them_trains(name):
    """At a sixteenth of the width and two layers."""
    model = load(name)
    widths = ("hidden_size", "intermediate_size", "intermediate_size_mlp", "head_dim")
    shrunk = {key: max(2, getattr(model, key) // 16) if getattr(model, key) else 0 for key in widths}
    model = replace(model, vocab_size=256, num_hidden_layers=2, **shrunk)
    network = MobileMoE(model)
    network.init_weights(0)
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    tokens = torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(3):
        loss = network(tokens, tokens).cross_entropy_sum / tokens.numel()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[2] < losses[0] - 0.1
    assert all(parameter.isfinite().all() for parameter in network.parameters())
