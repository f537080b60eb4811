"""FLOPs against torch's own counter and published shares; communication against calls counted on real processes."""

import dataclasses
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from mm_train import config
from mm_train.costs import (
    GPUS,
    Layout,
    communication,
    days,
    forward_flops,
    hardware_train_flops,
    kv_bytes_per_token,
    matmul_parameters,
    tokens_per_second,
    train_flops,
)
from mm_train.model import MobileMoE
from mm_train.rules import validate_model

ROOT = Path(__file__).parents[2]
# The network on which calls of torch.distributed were counted (2 micro-steps of 2 x 64 tokens, float32).
COUNTED = config.Model(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=64,
    intermediate_size_mlp=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=16,
    num_experts_per_tok=4,
)


def load(name: str) -> config.Model:
    return config.load([ROOT / f"configs/model/{name}.yaml"], check=lambda c: validate_model(c.model)).model


@pytest.mark.parametrize(
    ("size", "short", "long", "shares"),
    [("s", 1.82, 2.39, (32, 23, 23, 10)), ("m", 3.50, 4.48, (23, 28, 28, 9)), ("l", 6.03, 7.54, (16, 31, 31, 8))],
)
def test_training_flops_of_the_published_sizes(size, short, long, shares):
    """GFLOP a token at 2048 and 8192 tokens, and where they go at 2048, as worked out by hand before this code was."""
    model = load(size)
    flops = train_flops(model, 2048)
    assert round(sum(flops.values()) / 1e9, 2) == short
    assert round(sum(train_flops(model, 8192).values()) / 1e9, 2) == long
    parts = ("head", "routed experts", "shared expert", "attention scores")
    assert tuple(round(100 * flops[part] / sum(flops.values())) for part in parts) == shares


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"intermediate_size_mlp": 0, "num_experts_per_tok": 3},
        {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 0},
    ],
    ids=["moe", "no shared expert", "dense"],
)
def test_forward_flops_are_those_that_torch_counts(change, small_model):
    model = dataclasses.replace(small_model, **change)
    network = MobileMoE(model)
    network.init_weights(0)
    aten = torch.ops.aten
    missing = {  # from torch's table, shapes as the counter hands them over
        aten._grouped_mm: lambda x, w, *_, **__: 2 * x[0] * x[1] * w[2],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, *_, **__: 4 * q[1] * q[2] * k[2] * q[3],
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=missing) as counter:
        network(torch.zeros(1, 64, dtype=torch.long))
    counted = dict(counter.get_flop_counts()["Global"])
    flops = {part: 64 * count for part, count in forward_flops(model, 64).items()}
    attention = counted.pop(aten._scaled_dot_product_flash_attention_for_cpu)
    assert attention == 2 * flops.pop("attention scores")  # the counter does not know that half of it is masked
    assert counted.pop(aten._grouped_mm, 0) == flops.pop("routed experts", 0)
    assert counted.pop(aten.mm) == sum(flops.values())
    assert set(counted) <= {aten.bmm}  # weighing the experts' outputs: multiplications of rows, left out


def test_the_experts_of_a_token_count_and_no_others(small_model):
    width, hidden = small_model.hidden_size, small_model.intermediate_size
    routed = 3 * width * hidden * small_model.num_experts_per_tok * small_model.num_hidden_layers
    assert matmul_parameters(small_model)["routed experts"] == routed
    assert matmul_parameters(small_model).keys().isdisjoint({"norms", "embedding"})
    assert matmul_parameters(small_model)["router"] == 8 * width * small_model.num_hidden_layers  # without its bias


def test_drop_and_pad_does_more_than_the_model_needs():
    model = load("s")
    flops = train_flops(model, 2048)
    padded = hardware_train_flops(model, Layout(capacity_factor=1.5))
    assert padded - sum(flops.values()) == pytest.approx(flops["routed experts"] / 2, rel=2e-3)
    assert hardware_train_flops(model, Layout()) == sum(flops.values())
    dense = load("s-dense")
    assert hardware_train_flops(dense, Layout(capacity_factor=1.5)) == sum(train_flops(dense, 2048).values())


def test_what_is_computed_twice():
    model = load("s")
    flops = train_flops(model, 2048)
    total = sum(flops.values())
    again = hardware_train_flops(model, Layout(recompute=True)) - total
    assert again == pytest.approx((total - flops["head"]) / 3)
    doubled = hardware_train_flops(model, Layout(2, tensor_parallel=2, deepspeed=True)) - total
    assert doubled == flops["routed experts"] + flops["router"]


def test_cache_of_a_token():
    assert kv_bytes_per_token(load("s")) == 2 * 20 * 4 * 64 * 2
    assert kv_bytes_per_token(load("s"), 1) * 2 == kv_bytes_per_token(load("s"))


@pytest.mark.parametrize(
    ("gpus", "ep", "zero", "capacity", "reduced", "gathered", "exchanged"),
    [
        # world, expert parallel, ZeRO, capacity factor; bytes sent by a rank in a step, of which (dense, experts)
        (2, 1, 0, None, (7_564_800,), (0,), 0),
        (2, 1, 1, None, (7_564_800,), (3_782_400,), 0),
        (2, 1, 2, 1.5, (15_129_600,), (3_782_400,), 0),
        (4, 2, 1, 1.5, (4_269_312, 2_359_296), (2_134_656, 1_179_648), 4_718_592),
        (4, 2, 2, 1.5, (8_538_624, 4_718_592), (2_134_656, 1_179_648), 4_718_592),
        (2, 2, 0, 1.5, (2_846_208, 0), (0, 0), 4_718_592),
        (2, 2, 1, 1.5, (2_846_208, 0), (1_423_104, 0), 4_718_592),
        (1, 1, 0, None, (0,), (0,), 0),
        (1, 1, 1, None, (0,), (0,), 0),
    ],
)
def test_communication_is_what_ranks_were_counted_to_send(gpus, ep, zero, capacity, reduced, gathered, exchanged):
    """Counted on gloo ranks with deepspeed 0.19.8, less some bytes for norms: all-reduces, all-gathers, all-to-alls."""
    layout = Layout(gpus, ep, zero, 2, 64, micro_steps=2, activation_bytes=4, capacity_factor=capacity, deepspeed=True)
    kinds = communication(COUNTED, layout)
    for name, counted in (("gradient_all_reduce", reduced), ("weight_all_gather", gathered)):
        parts = (kinds[f"{name}_dense"], kinds[f"{name}_experts"])
        assert sum(parts) == sum(counted)
        assert len(counted) == 1 or parts == counted
    assert kinds["all_to_all_dispatch"] == kinds["all_to_all_combine"] == exchanged / 2
    assert kinds["total"] == sum(reduced) + sum(gathered) + exchanged


@pytest.mark.parametrize(
    ("gpus", "tp", "ep", "zero", "recompute", "size", "reduced", "gathered", "exchanged", "tensor"),
    [
        # world, tensor and expert parallel, ZeRO, recomputation, bytes of an activation; bytes sent by a rank in a step
        (2, 2, 1, 0, False, 4, 0, 0, 0, 1_841_152),
        (2, 2, 1, 1, True, 4, 0, 0, 0, 2_627_584),
        (2, 2, 1, 1, False, 2, 0, 0, 0, 989_184),
        (4, 2, 2, 0, False, 4, 1_437_184, 0, 4_718_592, 1_841_152),
        (4, 2, 2, 1, True, 4, 1_437_184, 718_592, 7_077_888, 2_627_584),
        (4, 2, 1, 2, True, 2, 12_311_552, 3_077_888, 0, 1_382_400),
        (2, 1, 2, 1, True, 4, 2_846_208, 1_423_104, 7_077_888, 0),
        (4, 1, 4, 0, True, 4, 4_269_312, 0, 10_616_832, 0),
    ],
)
def test_tensor_parallelism_and_recomputation_send_what_was_counted(
    gpus, tp, ep, zero, recompute, size, reduced, gathered, exchanged, tensor
):
    """Counted as above, with megatron-core 0.16.1."""
    layout = Layout(
        gpus, ep, zero, 2, 64, micro_steps=2, activation_bytes=size, capacity_factor=1.5, deepspeed=True,
        tensor_parallel=tp, recompute=recompute,
    )  # fmt: skip
    kinds = communication(COUNTED, layout)
    assert kinds["gradient_all_reduce_dense"] + kinds["gradient_all_reduce_experts"] == reduced
    assert kinds["weight_all_gather_dense"] + kinds["weight_all_gather_experts"] == gathered
    assert kinds["all_to_all_dispatch"] == kinds["all_to_all_combine"] == exchanged / 2
    assert kinds["tensor_all_reduce"] == tensor
    assert kinds["total"] == reduced + gathered + exchanged + tensor


def test_a_dense_network_recomputes_all_but_its_last_all_reduce():
    dense = dataclasses.replace(COUNTED, num_local_experts=0, num_experts_per_tok=0, intermediate_size=0)
    layout = Layout(2, 1, 1, 2, 64, micro_steps=2, activation_bytes=4, deepspeed=True, tensor_parallel=2)
    counted = {False: 1_841_152, True: 2_234_368}
    for recompute, sent in counted.items():
        assert communication(dense, dataclasses.replace(layout, recompute=recompute))["tensor_all_reduce"] == sent


def test_dropless_exchange_is_the_slots_that_leave():
    layout = Layout(2, 2, 1, 2, 64, micro_steps=2, activation_bytes=4, deepspeed=True)
    assert communication(COUNTED, layout)["all_to_all_dispatch"] == 2 * 3 * 2 * (128 * 4) * 128 * 4 // 2


def test_days_follow_from_flops():
    per_gpu = tokens_per_second(989e12 * 0.5 / 1000, GPUS["h100"], 0.5)
    assert per_gpu == pytest.approx(1000)
    assert days(86_400_000 * 64, 64, per_gpu) == pytest.approx(1)
    assert days(1e12, 64, per_gpu) * 64 == pytest.approx(days(1e12, 1, per_gpu))
