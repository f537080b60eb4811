import pytest
import torch

from kernels.permute import plan_capacity, plan_dropless
from kernels.router import route, route_and_count
from tests.kernels.comparing import routing

CASES = [(70, 8, 1, "random"), (33, 8, 4, "empty"), (200, 60, 4, "random"), (64, 64, 8, "one"), (1, 60, 4, "random")]


def routed(monkeypatch, device, tokens, experts, top_k, load):
    """The reference's ids and counts, and Triton's routing of the same logits."""
    logits, bias = routing(tokens, experts, top_k, load=load).to(device), torch.zeros(experts, device=device)
    ids = route(logits, bias, top_k, 1.0)[0]
    monkeypatch.setenv("MM_KERNELS", "triton")
    return ids, torch.bincount(ids.flatten(), minlength=experts), route_and_count(logits, bias, top_k, 1.0)


@pytest.mark.parametrize("case", CASES)
def test_dropless_rows_are_those_of_the_sort(monkeypatch, device, poison, case):
    ids, counts, found = routed(monkeypatch, device, *case)
    want = plan_dropless(ids, counts)
    got = plan_dropless(found.ids_TK, found.counts_E, found.places)
    assert torch.equal(got.slot_R.long(), want.slot_R)
    assert torch.equal(got.row_TK.long(), want.row_TK)
    assert got.full
    assert torch.equal(got.used_E.long(), counts)
    assert torch.equal(got.starts_E.long(), counts.cumsum(0) - counts)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("capacity", [1, 13, 200])
def test_rows_with_a_capacity_are_those_of_the_sort(monkeypatch, device, poison, case, capacity):
    ids, counts, found = routed(monkeypatch, device, *case)
    want = plan_capacity(ids, counts, capacity)
    got = plan_capacity(found.ids_TK, found.counts_E, capacity, found.places)
    assert torch.equal(got.slot_R.long(), want.slot_R)
    assert torch.equal(got.row_TK.long(), want.row_TK)
    assert not got.full
    assert torch.equal(got.used_E.long(), counts.clamp(max=capacity))
    assert got.starts_E.tolist() == [expert * capacity for expert in range(len(counts))]
