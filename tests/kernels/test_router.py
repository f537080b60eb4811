import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.router import route, z_loss_sum


def by_hand(logits, bias, top_k, scale):
    """The specification, token by token."""
    ids, weights = [], []
    for row in logits.tolist():
        scores = [float(torch.sigmoid(torch.tensor(x, dtype=torch.float64))) for x in row]
        order = sorted(range(len(row)), key=lambda e: (-(scores[e] + float(bias[e])), e))[:top_k]
        total = sum(scores[e] for e in order) + 1e-20
        ids.append(order)
        weights.append([scores[e] / total * scale for e in order])
    return torch.tensor(ids), torch.tensor(weights)


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 10_000), st.sampled_from([(8, 1), (16, 4), (60, 4), (64, 8)]))
def test_matches_the_specification(seed, shape):
    num_experts, top_k = shape
    torch.manual_seed(seed)
    logits, bias = torch.randn(7, num_experts).double(), torch.randn(num_experts).double() * 0.3
    ids, weights = route(logits, bias, top_k, 2.5)
    want_ids, want_weights = by_hand(logits, bias, top_k, 2.5)
    assert torch.equal(ids, want_ids)
    torch.testing.assert_close(weights, want_weights.double(), rtol=1e-6, atol=0)


def test_equal_scores_go_to_the_lower_id():
    ids, weights = route(torch.zeros(3, 60), torch.zeros(60), 4, 2.5)
    assert ids.tolist() == [[0, 1, 2, 3]] * 3
    torch.testing.assert_close(weights, torch.full((3, 4), 2.5 / 4))


def test_the_bias_selects_but_does_not_weigh():
    bias = torch.tensor([0.0, 0.0, 5.0, 0.0])
    ids, weights = route(torch.tensor([[2.0, 1.0, -3.0, 0.0]]), bias, 2, 1.0)
    assert ids.tolist() == [[2, 0]]
    scores = torch.sigmoid(torch.tensor([-3.0, 2.0]))
    torch.testing.assert_close(weights[0], scores / scores.sum())


def test_without_normalisation_the_raw_scores_are_the_weights():
    logits = torch.tensor([[2.0, 1.0]])
    torch.testing.assert_close(route(logits, torch.zeros(2), 2, 1.0, normalise=False)[1], torch.sigmoid(logits))


def test_gradients():
    torch.manual_seed(0)
    logits = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(8, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: route(x, bias, 3, 2.5)[1], logits)
    assert torch.autograd.gradcheck(z_loss_sum, logits)


def test_z_loss_is_the_squared_log_partition():
    logits = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    want = torch.log(torch.tensor(2.0)) ** 2 + (1 + torch.log(torch.tensor(2.0))) ** 2
    assert z_loss_sum(logits).item() == pytest.approx(want.item())


def test_softmax_scores_all_experts_against_each_other():
    torch.manual_seed(0)
    logits, bias = torch.randn(7, 16), torch.randn(16) * 0.1
    ids, weights = route(logits, bias, 4, 1.0, scoring="softmax")
    scores = logits.exp() / logits.exp().sum(-1, keepdim=True)
    assert torch.equal(ids, (scores + bias).argsort(dim=-1, descending=True, stable=True)[:, :4])
    chosen = scores.gather(1, ids)
    torch.testing.assert_close(weights, chosen / chosen.sum(-1, keepdim=True))
    raw = route(logits, bias, 4, 1.0, normalise=False, scoring="softmax")[1]
    torch.testing.assert_close(raw, chosen)
