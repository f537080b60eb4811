"""What the interpreter cannot show: 16 bits, races, graphs. At the widths of S, many tiles, uneven loads."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.experts import experts
from kernels.router import route_and_count
from tests.kernels.comparing import by_experts, routing

pytestmark = pytest.mark.gpu
TOKENS, EXPERTS, TOP_K, WIDTH, HIDDEN, CLASSES = 3000, 60, 4, 768, 384, 5000
NEAR = 2**-6  # of the norm of what is compared: a few roundings to bfloat16


def leaves(dtype, load="random"):
    """Inputs of a layer and its loss; what is 16 bits wide in one dtype is rounded in the other."""
    torch.manual_seed(0)
    found = {
        "logits": routing(TOKENS, EXPERTS, TOP_K, load=load),
        "x": torch.randn(TOKENS, WIDTH).bfloat16(),
        "gate_up": (torch.randn(EXPERTS, WIDTH, 2 * HIDDEN) * WIDTH**-0.5).bfloat16(),
        "down": (torch.randn(EXPERTS, HIDDEN, WIDTH) * HIDDEN**-0.5).bfloat16(),
        "head": (torch.randn(CLASSES, WIDTH) * WIDTH**-0.5).bfloat16(),
    }
    labels = torch.randint(0, CLASSES, (TOKENS,)).cuda()
    labels[::7] = -100
    wide = {name: leaf.cuda().to(dtype if name == "x" else torch.float32) for name, leaf in found.items()}
    return {name: leaf.requires_grad_() for name, leaf in wide.items()}, labels


def layer(logits, x, gate_up, down, head, labels, capacity=0, fused=True):
    """Everything that a mixture layer and the loss call; all outputs and nothing else."""
    found = route_and_count(logits, torch.zeros(EXPERTS, device="cuda"), TOP_K, 2.5)
    y, counts = by_experts(found, x, found.weights_TK, gate_up, down, capacity, fused)
    loss = linear_cross_entropy(y, head, labels) / TOKENS + found.z_loss_sum / TOKENS
    return loss, y, found.weights_TK, counts


def results(dtype, **options):
    """Outputs and gradients by name."""
    mine, labels = leaves(dtype, options.pop("load", "random"))
    outputs = layer(*mine.values(), labels, **options)
    outputs[0].backward()
    return {f"output {i}": out.detach() for i, out in enumerate(outputs)} | {f"d{n}": x.grad for n, x in mine.items()}


@pytest.mark.parametrize("load", ["random", "one", "empty"])
@pytest.mark.parametrize(("capacity", "fused"), [(0, True), (0, False), (300, True), (300, False)])
def test_bfloat16_agrees_with_the_reference_in_float32(monkeypatch, load, capacity, fused):
    monkeypatch.setenv("MM_KERNELS", "reference")
    want = results(torch.float32, load=load, capacity=capacity, fused=fused)
    monkeypatch.setenv("MM_KERNELS", "triton")
    got = results(torch.bfloat16, load=load, capacity=capacity, fused=fused)
    for name, expected in want.items():
        assert torch.isfinite(got[name]).all(), name
        # Expert by expert, or an expert with few rows could be wrong altogether.
        parts = zip(got[name], expected, strict=True) if name in ("dgate_up", "ddown") else [(got[name], expected)]
        for number, (ours, theirs) in enumerate(parts):
            difference = (ours.float() - theirs).norm() / theirs.norm().clamp(min=1e-6)
            assert difference < NEAR, (name, number, difference.item())


@pytest.mark.parametrize("size", [(1024, 512), (1280, 640)], ids=["m", "l"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_experts_of_other_sizes_and_dtypes(monkeypatch, size, dtype):
    width, hidden = size
    torch.manual_seed(0)
    counts = torch.tensor([700, 0, 1, 333]).cuda()
    tensors = [torch.randn(1034, width), torch.randn(4, width, 2 * hidden), torch.randn(4, hidden, width)]
    scales = (1.0, width**-0.5, hidden**-0.5)
    wide = [(tensor * scale).to(dtype).float().cuda() for tensor, scale in zip(tensors, scales, strict=True)]
    results = []
    for kernels, narrow in (("reference", torch.float32), ("triton", dtype)):
        monkeypatch.setenv("MM_KERNELS", kernels)
        mine = [wide[0].to(narrow).requires_grad_(), *(weight.clone().requires_grad_() for weight in wide[1:])]
        out = experts(*mine, counts)
        out.float().square().sum().backward()
        results.append([out, *(leaf.grad for leaf in mine)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < (1e-5 if dtype == torch.float32 else NEAR)


def test_the_loss_over_the_whole_vocabulary_in_several_chunks(monkeypatch):
    torch.manual_seed(0)
    hidden, weight = torch.randn(9000, 256).bfloat16().cuda(), (torch.randn(128256, 256) / 16).cuda()
    labels = torch.randint(0, 128256, (9000,)).cuda()
    results = []
    for kernels, dtype in (("reference", torch.float32), ("triton", torch.bfloat16)):
        monkeypatch.setenv("MM_KERNELS", kernels)
        mine = [hidden.to(dtype).requires_grad_(), weight.clone().requires_grad_()]
        loss = linear_cross_entropy(*mine, labels)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in mine)])
    for ours, theirs in zip(results[1], results[0], strict=True):
        assert (ours.float() - theirs).norm() / theirs.norm() < NEAR


@pytest.mark.parametrize("capacity", [0, 300])
def test_two_runs_are_bitwise_equal(monkeypatch, capacity):
    monkeypatch.setenv("MM_KERNELS", "triton")
    first, second = (results(torch.bfloat16, capacity=capacity) for _ in range(2))
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


@pytest.mark.parametrize("capacity", [0, 300])
def test_forward_and_backward_run_from_a_captured_graph(monkeypatch, capacity):
    """Nothing waits for the device, and sizes do not depend on what was routed: new logits give their own results."""
    monkeypatch.setenv("MM_KERNELS", "triton")
    mine, labels = leaves(torch.bfloat16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())

    def step():
        loss = layer(*mine.values(), labels, capacity)[0]
        return loss, torch.autograd.grad(loss, list(mine.values()))

    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled here
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss, gradients = step()
    with torch.no_grad():
        mine["logits"].copy_(routing(TOKENS, EXPERTS, TOP_K, seed=5, load="empty"))
    graph.replay()
    want_loss, want_gradients = step()
    assert torch.equal(loss, want_loss)
    for got, want in zip(gradients, want_gradients, strict=True):
        assert torch.equal(got, want)


def test_nothing_waits_for_the_device(monkeypatch):
    monkeypatch.setenv("MM_KERNELS", "triton")
    results(torch.bfloat16)
    mine, labels = leaves(torch.bfloat16)
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer(*mine.values(), labels)[0].backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
