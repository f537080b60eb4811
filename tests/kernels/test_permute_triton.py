import pytest
import torch

from kernels.permute import permute, plan_capacity, plan_dropless, unpermute
from kernels.router import route
from tests.kernels.comparing import assert_same, routing

CASES = [(33, 8, 1, 24), (70, 8, 4, 300), (41, 60, 4, 64), (17, 64, 8, 16)]


def plan_of(tokens, experts, top_k, capacity, device):
    ids, weights = route(routing(tokens, experts, top_k), torch.zeros(experts), top_k, 2.5)
    ids, counts = ids.to(device), torch.bincount(ids.flatten(), minlength=experts).to(device)
    plan = plan_capacity(ids, counts, capacity) if capacity else plan_dropless(ids, counts)
    return plan, weights


@pytest.mark.parametrize("capacity", [0, 3, 40])
@pytest.mark.parametrize(("tokens", "experts", "top_k", "width"), CASES)
def test_there_and_back_with_every_gradient(by_both, device, poison, tokens, experts, top_k, width, capacity):
    plan, weights = plan_of(tokens, experts, top_k, capacity, device)
    torch.manual_seed(0)
    assert_same(by_both(permute, {"x": torch.randn(tokens, width)}, plan), rtol=1e-6, atol=1e-7)
    rows = torch.randn(plan.slot_R.numel(), width)
    leaves = {"y": rows, "weights": weights}
    assert_same(by_both(lambda y, w: unpermute(y, w, plan), leaves))


def test_padding_rows_are_zero_and_what_is_dropped_gets_no_gradient(monkeypatch, device, poison):
    plan, weights = plan_of(20, 8, 2, 3, device)
    monkeypatch.setenv("MM_KERNELS", "triton")
    x = torch.ones(20, 40, device=device)
    rows = permute(x, plan)
    assert (rows[plan.slot_R == 40] == 0).all()
    assert (rows[plan.slot_R != 40] == 1).all()
    weights = weights.to(device).requires_grad_()
    unpermute(rows, weights, plan).sum().backward()
    dropped = plan.row_TK == plan.slot_R.numel()
    assert dropped.any()
    assert (weights.grad[dropped] == 0).all()
    assert (weights.grad[~dropped] == 40).all()
