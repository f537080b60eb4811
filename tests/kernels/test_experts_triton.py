import pytest
import torch

from kernels.experts import experts, mixture
from kernels.permute import plan_dropless
from kernels.router import route_and_count
from tests.kernels.comparing import assert_same, by_experts, routing

CASES = [
    (70, 8, 2, 48, 32, "random"),
    (33, 8, 1, 32, 40, "one"),
    (41, 60, 4, 64, 16, "empty"),
    (9, 64, 8, 16, 16, "one"),
]


def leaves(tokens, experts_, width, hidden, top_k):
    torch.manual_seed(0)
    return {
        "x": torch.randn(tokens, width),
        "weights": torch.rand(tokens, top_k),
        "gate_up": torch.randn(experts_, width, 2 * hidden) * 0.2,
        "down": torch.randn(experts_, hidden, width) * 0.2,
    }


@pytest.mark.parametrize("capacity", [0, 5])
@pytest.mark.parametrize("case", CASES)
def test_the_mixture_is_permute_loop_unpermute_in_output_and_every_gradient(by_both, device, poison, case, capacity):
    tokens, num_experts, top_k, width, hidden, load = case
    logits = routing(tokens, num_experts, top_k, load=load).to(device)

    def function(x, weights, gate_up, down):
        found = route_and_count(logits, torch.zeros(num_experts, device=device), top_k, 1.0)
        return by_experts(found, x, weights, gate_up, down, capacity)[0]

    assert_same(by_both(function, leaves(tokens, num_experts, width, hidden, top_k)))


@pytest.mark.parametrize("counts", [[5, 0, 40], [0, 131, 2]])
@pytest.mark.parametrize("transform", [None, torch.tanh])
def test_rows_by_expert(by_both, device, poison, counts, transform):
    """As they arrive from other ranks; with a transformation of the hidden rows, as quantisation-aware training has."""
    found = leaves(sum(counts), 3, 48, 32, 1)
    del found["weights"]
    counts = torch.tensor(counts, device=device)
    assert_same(by_both(lambda x, gate_up, down: experts(x, gate_up, down, counts, transform), found))


def test_weights_in_another_dtype_get_gradients_in_theirs(monkeypatch, device):
    monkeypatch.setenv("MM_KERNELS", "triton")
    found = leaves(12, 3, 16, 16, 1)
    gate_up, down = (found[name].double().to(device).requires_grad_() for name in ("gate_up", "down"))
    experts(found["x"].to(device), gate_up, down, torch.tensor([4, 4, 4], device=device)).sum().backward()
    assert gate_up.grad.dtype == down.grad.dtype == torch.float64
    assert gate_up.grad.any()


def test_two_runs_are_bitwise_equal(monkeypatch, device):
    monkeypatch.setenv("MM_KERNELS", "triton")
    runs = []
    for _ in range(2):
        mine = {name: leaf.to(device).requires_grad_() for name, leaf in leaves(60, 8, 32, 32, 2).items()}
        found = route_and_count(routing(60, 8, 2).to(device), torch.zeros(8, device=device), 2, 1.0)
        plan = plan_dropless(found.ids_TK, found.counts_E, found.places)
        out = mixture(mine["x"], mine["weights"], plan, found.counts_E, mine["gate_up"], mine["down"])
        out.square().sum().backward()
        runs.append([out, *(leaf.grad for leaf in mine.values())])
    for a, b in zip(*runs, strict=True):
        assert torch.equal(a, b)
