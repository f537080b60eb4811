"""Predicted memory against what autograd, the engines and the profiler count."""

import dataclasses
import importlib.util
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.profiler import ProfilerActivity, profile, record_function

from kernels import cross_entropy
from mm_train import config, memory, muon
from mm_train.costs import Layout
from mm_train.engine import PlainEngine
from mm_train.memory import memory_bytes, saved_for_backward, shares
from mm_train.model import MobileMoE
from mm_train.quant import FakeQuant, enable_fake_quant

WIDE = config.Model(
    vocab_size=1024,
    hidden_size=96,
    intermediate_size=96,
    intermediate_size_mlp=224,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=3,
    head_dim=32,
    num_local_experts=8,
    num_experts_per_tok=3,
)
DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 0}
# The network whose DeepSpeed engine was taken apart on up to four processes.
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


def build(model: config.Model, layout: Layout) -> MobileMoE:
    network = MobileMoE(model, torch.bfloat16 if layout.activation_bytes == 2 else torch.float32)
    network.init_weights(0)
    for layer in network.moe_layers():
        layer.dispatcher.capacity_factor = layout.capacity_factor
    if layout.quantised:
        enable_fake_quant(network, FakeQuant())
    network.recompute = layout.recompute
    return network.train()


def run(network: MobileMoE, layout: Layout):
    tokens = torch.randint(network.config.vocab_size, (layout.micro_batch_size, layout.context))
    return network(tokens, tokens, torch.zeros_like(tokens))


def measured_saved(network: MobileMoE, layout: Layout) -> int:
    """Bytes that autograd saves in a forward pass: each storage once, parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            saved[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor: its memory must not be reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        run(network, layout)
    return sum(size for size, _ in saved.values())


@pytest.fixture(autouse=True)
def bfloat16_units(monkeypatch):
    """A GPU has them: without, a CPU computes in float32 and keeps that."""
    monkeypatch.setattr("kernels.linear._multiplies_bfloat16", lambda: True)


LAYOUTS = {
    "bfloat16": Layout(micro_batch_size=2, context=64),
    "float32": Layout(micro_batch_size=2, context=64, activation_bytes=4),
    "drop and pad": Layout(micro_batch_size=1, context=96, capacity_factor=1.5),
    "long rows": Layout(micro_batch_size=1, context=512),
    "quantised": Layout(micro_batch_size=3, context=32, quantised=True),
    "quantised float32": Layout(micro_batch_size=3, context=32, activation_bytes=4, quantised=True),
}
CHANGES = {
    "moe": {},
    "no shared expert": {"intermediate_size_mlp": 0},
    "dense": DENSE,
    "softmax, top 1": {"scoring_func": "softmax", "num_experts_per_tok": 1, "norm_topk_prob": False},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("shape", ["small", "wide"])
def test_what_autograd_saves(shape, change, layout, small_model):
    model = dataclasses.replace(small_model if shape == "small" else WIDE, **CHANGES[change])
    how = LAYOUTS[layout]
    predicted = saved_for_backward(model, how, fused_norms=False).total
    assert predicted == pytest.approx(measured_saved(build(model, how), how), rel=0.001)
    how = dataclasses.replace(how, recompute=True)
    predicted = saved_for_backward(model, how, fused_norms=False).total
    assert predicted == pytest.approx(measured_saved(build(model, how), how), rel=0.001)


@pytest.mark.parametrize(
    ("change", "size", "recompute", "saved"),
    [
        ("moe", 4, False, 64_585_312),
        ("moe", 2, False, 42_439_264),
        ("moe", 2, True, 4_128_256),
        ("no shared expert", 2, False, 37_232_224),
        ("dense", 4, False, 37_084_672),
    ],
)
def test_what_autograd_was_seen_to_save_under_tensor_parallelism(change, size, recompute, saved):
    """By the hooks above on two gloo ranks with megatron-core 0.16.1; its labels were its tokens, one tensor.

    Since then SwiGLU keeps one product less a layer, measured in the same way: 5,308,416 bytes in float32.
    """
    model = dataclasses.replace(WIDE, num_attention_heads=8, num_key_value_heads=4, **CHANGES[change])
    layout = Layout(2, 1, 0, 3, 512, 1, size, tensor_parallel=2, deepspeed=True, recompute=recompute)
    labels = 8 * layout.tokens
    assert saved_for_backward(model, layout, fused_norms=False).total == pytest.approx(saved + labels, rel=0.001)


def measured_peak(network: MobileMoE, layout: Layout) -> int:
    """Most bytes allocated at once in forward and backward pass, gradients not among them."""
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)

    def both() -> None:
        losses = run(network, layout)
        (losses.cross_entropy_sum + losses.z_loss_sum).backward()

    return peak_of(both)


def peak_of(work: Callable[[], object]) -> int:
    """Most bytes that are allocated at once while it runs, beyond those before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, record_function("pass"):
        work()
    events = profiler.profiler.kineto_results.events()
    now = peak = 0
    for event in sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize(
    "change",
    [
        {"vocab_size": 8192, "num_hidden_layers": 1},  # the loss needs most
        {"vocab_size": 128, "num_hidden_layers": 4, "intermediate_size_mlp": 0},  # the backward pass does
        {"vocab_size": 128, "num_hidden_layers": 4, **DENSE},
    ],
    ids=["loss", "experts", "dense"],
)
@pytest.mark.parametrize("recompute", [False, True])
def test_peak_of_forward_and_backward(change, recompute):
    model = dataclasses.replace(WIDE, **change)
    layout = Layout(micro_batch_size=8, context=256, activation_bytes=4, recompute=recompute)
    parts = memory_bytes(model, layout)
    norms = saved_for_backward(model, layout, fused_norms=False).activations - parts["activations"]
    if recompute:
        fused, composed = (memory.saved_by_a_layer(model, layout, norms).activations for norms in (True, False))
        norms += composed - fused
    predicted = parts["activations"] + parts["weight_copies"] + parts["loss_and_backward_buffers"] + norms
    assert predicted == pytest.approx(measured_peak(build(model, layout), layout), rel=0.05)


def test_the_plain_engine_holds_sixteen_bytes_a_parameter(small_model):
    layout = Layout(micro_batch_size=2, context=64)
    network = build(small_model, layout)
    engine = PlainEngine(network, config.Optim())
    run(network, layout).cross_entropy_sum.backward()
    parts = memory_bytes(small_model, layout)
    states = engine.adam.state.values()
    assert parts["weights"] == sum(t.nbytes for t in (*network.parameters(), *network.buffers()))
    assert parts["gradients"] == sum(p.grad.nbytes for p in network.parameters())
    assert parts["moments"] == sum(state[key].nbytes for state in states for key in ("exp_avg", "exp_avg_sq"))
    assert parts["master_weights"] == parts["gradient_buckets"] == 0
    assert parts["total"] == sum(size for part, size in parts.items() if part != "total")


@pytest.mark.parametrize(
    ("gpus", "ep", "zero", "weights", "master", "moments", "gradients"),
    [
        # bytes of flat weights, master partition, moments; most that one rank kept of gradients at the optimizer step
        (1, 1, 0, 7_564_800, 0, 15_129_600, 7_564_800),
        (2, 2, 0, 5_205_504, 0, 10_411_008, 5_205_504),
        (4, 4, 0, 4_025_856, 0, 8_051_712, 4_025_856),
        (1, 1, 1, 7_564_800, 7_564_800, 15_129_600, 7_564_800),
        (2, 1, 1, 7_564_800, 3_782_400, 7_564_800, 4_474_880),
        (2, 1, 2, 7_564_800, 3_782_400, 7_564_800, 4_474_880),
        (2, 2, 1, 5_205_504, 3_782_400, 7_564_800, 3_876_864),
        (4, 2, 1, 5_205_504, 1_891_200, 3_782_400, 2_827_776),
        (4, 2, 2, 5_205_504, 1_891_200, 3_782_400, 2_827_776),
    ],
)
def test_deepspeed_holds_what_its_engine_was_seen_to_hold(gpus, ep, zero, weights, master, moments, gradients):
    layout = Layout(gpus, ep, zero, 2, 64, micro_steps=2, activation_bytes=4, deepspeed=True)
    parts, own = memory_bytes(COUNTED, layout), shares(COUNTED, layout)
    biases = 4 * 16 * 3
    assert (parts["weights"] - biases, parts["master_weights"], parts["moments"]) == (weights, master, moments)
    assert gradients <= 4 * own.touched <= 1.1 * gradients  # an upper bound: parameter groups peak on different ranks


@pytest.mark.parametrize(
    ("gpus", "ep", "zero", "weights", "master", "moments"),
    [
        (2, 1, 0, 6_155_776, 0, 12_311_552),
        (2, 1, 1, 6_155_776, 6_155_776, 12_311_552),
        (4, 2, 0, 3_796_480, 0, 7_592_960),
        (4, 2, 2, 3_796_480, 3_077_888, 6_155_776),
        (4, 1, 2, 6_155_776, 3_077_888, 6_155_776),
    ],
)
def test_two_tensor_parallel_ranks_hold_what_they_were_seen_to_hold(gpus, ep, zero, weights, master, moments):
    layout = Layout(gpus, ep, zero, 2, 64, micro_steps=2, activation_bytes=4, deepspeed=True, tensor_parallel=2)
    parts = memory_bytes(COUNTED, layout)
    assert (parts["weights"] - 4 * 16 * 3, parts["master_weights"], parts["moments"]) == (weights, master, moments)


def test_zero_0_copies_gradients_bucket_by_bucket():
    layout = Layout(8, 1, 0, micro_batch_size=1, context=1, activation_bytes=4, deepspeed=True)
    parts = memory_bytes(COUNTED, layout)
    passes = parts["activations"] + parts["loss_and_backward_buffers"]
    assert parts["optimizer_step"] == 7_564_800 - passes > 0  # all gradients are one bucket here
    assert memory_bytes(COUNTED, dataclasses.replace(layout, gpus=1, deepspeed=False))["optimizer_step"] == 0
    wide = dataclasses.replace(COUNTED, hidden_size=8192, intermediate_size=1024)
    largest = memory._largest_bucket(wide, layout)
    assert memory.REDUCE_BUCKET < largest <= memory.REDUCE_BUCKET + 16 * 8192 * 2 * 1024


def test_zero_and_expert_parallel_save_what_they_should():
    on_one = memory_bytes(COUNTED, Layout())
    one, two = (memory_bytes(COUNTED, Layout(8, 1, stage, micro_steps=4, deepspeed=True)) for stage in (1, 2))
    assert one["weights"] == two["weights"] == on_one["weights"]
    assert one["gradients"] == on_one["gradients"] > two["gradients"]
    assert on_one["moments"] == pytest.approx(8 * one["moments"], rel=1e-3)
    assert one["moments"] == 2 * one["master_weights"] == two["moments"]
    sharded = memory_bytes(COUNTED, Layout(8, 4, 1, deepspeed=True))
    experts = 4 * 3 * 16 * 3 * 128 * 64
    assert one["weights"] - sharded["weights"] == experts * 3 / 4
    assert sharded["gradient_buckets"] == 4 * 500_000_000


def test_thousands_of_gpus_are_no_trouble():
    parts = memory_bytes(COUNTED, Layout(1_000_000, 16, 2, deepspeed=True))
    assert 0 < parts["moments"] < 1000


def test_cuda_keeps_less_of_a_norm():
    layout = Layout()
    fused, composed = (saved_for_backward(WIDE, layout, fused_norms=fused) for fused in (True, False))
    assert composed.activations - fused.activations == layout.tokens * (2 * 3 + 1) * 96 * 4


def test_constants_are_those_of_the_code_they_describe():
    assert memory.CHUNK_ROWS == cross_entropy.CHUNK_ROWS
    found = importlib.util.find_spec("deepspeed")
    if found is None or not found.submodule_search_locations:
        pytest.skip("deepspeed is not installed")
    folder = Path(found.submodule_search_locations[0])  # its sources: importing it takes half a minute
    defaults = (folder / "runtime/zero/config.py").read_text()
    bucket = re.search(r"reduce_bucket_size: int = Field\(pp_int\((\w+)\)", defaults)
    assert float(bucket.group(1)) == memory.REDUCE_BUCKET
    assert "use_multi_rank_bucket_allreduce: bool = True" in defaults
    assert f"max_group_size: Union[int, float] = {memory.MAX_EXPERT_GROUP}" in (folder / "moe/utils.py").read_text()
    optimizer = (folder / "runtime/zero/stage_1_and_2.py").read_text()
    assert f"self.nccl_start_alignment_factor = {memory.ALIGNMENT}" in optimizer


def test_muon_keeps_one_moment_of_what_it_moves_and_works_in_bounded_memory(small_model, monkeypatch):
    layout = Layout(micro_batch_size=2, context=64, activation_bytes=4, muon=True)
    network = build(small_model, layout)
    engine = PlainEngine(network, config.Optim(name="muon"))
    parts = memory_bytes(small_model, layout)
    states = [t for state in engine.adam.state.values() for key, t in state.items() if key != "step"]
    assert parts["moments"] == sum(tensor.nbytes for tensor in states)
    assert parts["moments"] < 0.7 * memory_bytes(small_model, dataclasses.replace(layout, muon=False))["moments"]
    for chunk, tolerance in ((1 << 25, 0.02), (3 * 64 * 64, 0.25)):
        monkeypatch.setattr("mm_train.muon.CHUNK", chunk)
        monkeypatch.setattr("mm_train.memory.MUON_CHUNK", chunk)
        for parameter in network.parameters():
            parameter.grad = torch.ones_like(parameter)
        predicted = memory._orthogonalising(small_model, layout)
        assert predicted == pytest.approx(peak_of(lambda: engine.step(1e-3)), rel=tolerance)


def test_muons_memory_in_other_layouts():
    plain = memory_bytes(COUNTED, Layout(muon=True))
    for stage in (1, 2):
        zero = memory_bytes(COUNTED, Layout(8, 1, stage, micro_steps=4, deepspeed=True, muon=True))
        assert 8 * zero["moments"] == pytest.approx(plain["moments"], rel=1e-3)
    one, four = (shares(COUNTED, Layout(4, ep, 1, deepspeed=True, muon=True)) for ep in (1, 4))
    assert four.muon == pytest.approx(one.muon, rel=1e-3)
    assert shares(COUNTED, Layout(muon=True)).muon < shares(COUNTED, Layout(muon=True)).partition
    assert muon.CHUNK == memory.MUON_CHUNK
