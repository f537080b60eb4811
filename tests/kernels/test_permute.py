import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.permute import invert, permute, plan_capacity, plan_dropless, reorder, unpermute

shapes = st.tuples(st.integers(1, 20), st.integers(1, 4), st.integers(4, 9), st.integers(0, 10_000))


def choose(num_tokens, top_k, num_experts, seed):
    torch.manual_seed(seed)
    ids = torch.stack([torch.randperm(num_experts)[:top_k] for _ in range(num_tokens)])
    return ids, torch.bincount(ids.flatten(), minlength=num_experts)


@settings(deadline=None, max_examples=60)
@given(shapes)
def test_dropless_rows_are_the_slots_sorted_by_expert(shape):
    ids, counts = choose(*shape)
    top_k = ids.shape[1]
    plan = plan_dropless(ids, counts)
    want = [
        t * top_k + k
        for e in range(len(counts))
        for t, row in enumerate(ids.tolist())
        for k, x in enumerate(row)
        if x == e
    ]
    assert plan.slot_R.tolist() == want
    assert torch.equal(plan.slot_R[plan.row_TK.flatten()], torch.arange(ids.numel()))


@settings(deadline=None, max_examples=60)
@given(shapes, st.integers(1, 6))
def test_capacity_keeps_the_first_slots_of_each_expert(shape, capacity):
    ids, counts = choose(*shape)
    top_k, num_rows = ids.shape[1], len(counts) * capacity
    plan = plan_capacity(ids, counts, capacity)
    assert plan.slot_R.numel() == num_rows
    for expert in range(len(counts)):
        slots = [t * top_k + k for t, row in enumerate(ids.tolist()) for k, x in enumerate(row) if x == expert]
        kept = slots[:capacity] + [ids.numel()] * (capacity - len(slots[:capacity]))
        assert plan.slot_R[expert * capacity : (expert + 1) * capacity].tolist() == kept
        for position, slot in enumerate(slots):
            row = plan.row_TK.flatten()[slot].item()
            assert row == (expert * capacity + position if position < capacity else num_rows)


@settings(deadline=None, max_examples=30)
@given(shapes, st.one_of(st.none(), st.integers(1, 3)))
def test_there_and_back_is_the_weighted_sum_of_what_was_kept(shape, capacity):
    ids, counts = choose(*shape)
    plan = plan_dropless(ids, counts) if capacity is None else plan_capacity(ids, counts, capacity)
    x = torch.randn(ids.shape[0], 3, dtype=torch.float64)
    weights = torch.rand(ids.shape, dtype=torch.float64)
    kept = (plan.row_TK < plan.slot_R.numel()).double()
    torch.testing.assert_close(unpermute(permute(x, plan), weights, plan), x * (weights * kept).sum(1, keepdim=True))


def test_padding_rows_are_zero():
    ids, counts = choose(5, 2, 4, 0)
    plan = plan_capacity(ids, counts, 6)
    rows = permute(torch.ones(5, 3), plan)
    assert rows.sum().item() == 3 * ids.numel()
    assert (rows[plan.slot_R == ids.numel()] == 0).all()


def test_reorder_and_its_gradient():
    torch.manual_seed(0)
    index = torch.randperm(7)
    x = torch.randn(7, 3, dtype=torch.float64, requires_grad=True)
    assert torch.equal(reorder(x, index, invert(index)), x[index])
    assert torch.autograd.gradcheck(lambda x: reorder(x, index, invert(index)), x)


def test_gradients_of_both_directions():
    for capacity in (None, 2):
        ids, counts = choose(6, 2, 5, 1)
        plan = plan_dropless(ids, counts) if capacity is None else plan_capacity(ids, counts, capacity)
        x = torch.randn(6, 3, dtype=torch.float64, requires_grad=True)
        y = torch.randn(plan.slot_R.numel(), 3, dtype=torch.float64, requires_grad=True)
        weights = torch.rand(6, 2, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda x, plan=plan: permute(x, plan), x)
        assert torch.autograd.gradcheck(lambda y, w, plan=plan: unpermute(y, w, plan), (y, weights))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("capacity", [None, 3])
def test_sums_are_exact_to_rounding_and_repeatable(dtype, capacity):
    """Against float64, forward and backward, twice: the second time bit for bit."""
    ids, counts = choose(40, 4, 9, 0)
    plan = plan_dropless(ids, counts) if capacity is None else plan_capacity(ids, counts, capacity)
    inputs = torch.randn(40, 16), torch.randn(plan.slot_R.numel(), 16), torch.rand(40, 4), torch.randn(40, 16)
    x, y, weights, dy = (t.to(dtype) for t in inputs)
    results = []
    for convert in (lambda t: t.clone(), lambda t: t.clone(), lambda t: t.double()):
        leaves = [convert(t).requires_grad_() for t in (x, y, weights)]
        rows, out = permute(leaves[0], plan), unpermute(leaves[1], leaves[2], plan)
        torch.autograd.backward([rows, out], [convert(y), convert(dy)])
        results.append([rows.detach(), out.detach(), *(leaf.grad for leaf in leaves)])
    for once, again, exact in zip(*results, strict=True):
        assert once.dtype == dtype
        assert torch.equal(once, again)
        assert (once.double() - exact).norm() <= 4 * torch.finfo(dtype).eps * exact.norm()


def test_dropped_slots_read_nothing():
    """Whatever stands in the rows of others."""
    plan = plan_capacity(torch.zeros(3, 1, dtype=torch.int64), torch.tensor([3, 0]), 1)
    y = torch.tensor([[1.0, 2.0], [torch.nan, torch.inf]])
    assert unpermute(y, torch.ones(3, 1), plan).tolist() == [[1, 2], [0, 0], [0, 0]]
