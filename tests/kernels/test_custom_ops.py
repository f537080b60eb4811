"""What torch has to know of an operator: schema, shapes without data, gradients; so that models can be compiled."""

import pytest
import torch

from kernels.cross_entropy import linear_cross_entropy
from kernels.experts import experts, mixture
from kernels.permute import permute, plan_dropless, unpermute
from kernels.router import route_and_count
from tests.kernels.comparing import by_experts


def layer(x, router, gate_up, down, head, labels, capacity=0, fused=True):
    """Everything that a mixture layer and the loss call, in one function."""
    found = route_and_count(x.float() @ router.T, torch.zeros(len(router), device=x.device), 2, 2.5)
    y, _ = by_experts(found, x, found.weights_TK, gate_up, down, capacity, fused)
    return linear_cross_entropy(y, head, labels) + found.z_loss_sum


def inputs(device, dtype=torch.float32):
    torch.manual_seed(0)
    shapes = {"x": (20, 32), "router": (4, 32), "gate_up": (4, 32, 32), "down": (4, 16, 32), "head": (40, 32)}
    leaves = [torch.randn(shape, device=device) * 0.3 for shape in shapes.values()]
    leaves[0] = leaves[0].to(dtype)
    return [leaf.requires_grad_() for leaf in leaves], torch.randint(0, 40, (20,), device=device)


@pytest.mark.parametrize(("capacity", "fused"), [(0, True), (0, False), (7, True), (7, False)])
def test_a_layer_compiles_as_one_graph_with_the_same_results(monkeypatch, device, capacity, fused):
    monkeypatch.setenv("MM_KERNELS", "triton")
    backend = "inductor" if device.type == "cuda" else "aot_eager"  # the interpreter cannot run inside inductor's code
    compiled = torch.compile(layer, fullgraph=True, backend=backend)
    results = []
    for function in (layer, compiled):
        leaves, labels = inputs(device)
        loss = function(*leaves, labels, capacity, fused)
        loss.backward()
        results.append([loss.detach(), *(leaf.grad for leaf in leaves)])
    for eager, graph in zip(*results, strict=True):
        torch.testing.assert_close(graph, eager)


def test_views_with_other_strides_give_the_same_gradients(monkeypatch, device):
    """Kernels go by rows that lie in memory one after the other: whatever comes in is laid so, or counted so."""
    monkeypatch.setenv("MM_KERNELS", "triton")
    results = []
    for strided in (False, True):
        leaves, labels = inputs(device)
        x, router, gate_up, down, head = (leaf.mT.contiguous().mT if strided else leaf for leaf in leaves)
        found = route_and_count((x @ router.T).T.contiguous().T, torch.zeros(4, device=device), 2, 2.5)
        weights = found.weights_TK.T.contiguous().T if strided else found.weights_TK
        plan = plan_dropless(found.ids_TK, found.counts_E, found.places)
        y = mixture(x, weights, plan, found.counts_E, gate_up, down)
        y = y + unpermute(experts(permute(x, plan), gate_up, down, found.counts_E).T.contiguous().T, weights, plan)
        linear_cross_entropy(y, head, labels).backward()  # and no z-loss
        results.append([leaf.grad for leaf in leaves])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want)


def test_frozen_weights_and_inputs_without_gradients(monkeypatch, device):
    monkeypatch.setenv("MM_KERNELS", "triton")
    leaves, labels = inputs(device)
    layer(*leaves, labels).backward()
    want = leaves[0].grad
    leaves, labels = inputs(device)
    frozen = [leaf.detach() for leaf in leaves[1:]]
    layer(leaves[0], *frozen, labels).backward()
    torch.testing.assert_close(leaves[0].grad, want)
    with torch.no_grad():
        assert not layer(*leaves, labels).requires_grad


def test_what_is_counted_has_no_gradient(monkeypatch, device):
    monkeypatch.setenv("MM_KERNELS", "triton")
    found = route_and_count(torch.randn(9, 8, device=device, requires_grad=True), torch.zeros(8, device=device), 2, 1.0)
    assert found.z_loss_sum.requires_grad
    assert not found.entropy_sum.requires_grad


def test_torch_finds_the_operators_well_defined(monkeypatch, device):
    """torch's own checks, of the operators as one call after the other makes them."""
    from kernels import cross_entropy_triton, experts_triton, grouped_matmul_triton, permute_triton, plan_triton
    from kernels import router_triton as router

    monkeypatch.setenv("MM_KERNELS", "triton")
    leaves, labels = inputs(device)
    x, router_weight, gate_up, down, head = leaves
    logits = (x.detach() @ router_weight.detach().T).requires_grad_()
    options = (logits, torch.zeros(4, device=device), 2, 2.5, True, False)
    ids, weights, counts, position, ahead, _, _ = router.route(*options)
    slot, row, starts, used = plan_triton.plan(ids, position, ahead, counts, 7)
    weights = weights.detach().requires_grad_()
    rows = torch.randn(28, 32, device=device, requires_grad=True)
    casts = (gate_up, down, gate_up.detach(), down.detach())
    for op, args in [
        (router.route, options),
        (plan_triton.plan, (ids, position, ahead, counts, 7)),
        (permute_triton.scatter, (x, slot, row, False)),
        (permute_triton.gather, (rows, weights, slot, row, False)),
        (experts_triton.mixture, (x, weights, *casts, slot, row, starts, used, False)),
        (experts_triton.experts, (rows, *casts, starts, used)),
        (grouped_matmul_triton.grouped_matmul, (rows, gate_up, gate_up.detach(), starts, used)),
        (cross_entropy_triton.linear_cross_entropy, (x, head, head.detach(), labels, True, -100)),
    ]:
        torch.library.opcheck(op, args, test_utils=("test_schema", "test_autograd_registration", "test_faketensor"))
