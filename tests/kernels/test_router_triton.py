import pytest
import torch

from kernels.router import route_and_count
from tests.kernels.comparing import assert_same, routing

SHAPES = [(70, 8, 1), (33, 8, 4), (130, 60, 4), (64, 64, 8), (1, 60, 4)]


def outputs(logits, bias, top_k, *options):
    """ids and counts in one dtype, so that both versions can be compared."""
    found = route_and_count(logits, bias, top_k, 2.5, *options)
    return found.ids_TK.long(), found.weights_TK, found.counts_E, found.z_loss_sum, found.entropy_sum


@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
@pytest.mark.parametrize("options", [(True, "sigmoid"), (False, "sigmoid"), (True, "softmax"), (False, "softmax")])
def test_equals_the_reference_in_everything_and_in_the_gradient(by_both, device, tokens, experts, top_k, options):
    bias = torch.randn(experts, device=device) * 0.1
    assert_same(by_both(outputs, {"logits": routing(tokens, experts, top_k)}, bias, top_k, *options))


@pytest.mark.parametrize("load", ["one", "empty"])
def test_lopsided_loads(by_both, device, load):
    found = by_both(outputs, {"logits": routing(150, 60, 4, load=load)}, torch.zeros(60, device=device), 4)
    assert_same(found)
    counts = found[1]["output 2"].tolist()
    assert counts[:5] == [150] * 4 + [0] if load == "one" else counts[30] == 0


def test_exact_ties_go_to_the_lower_id(by_both, device):
    torch.manual_seed(0)
    few_values = torch.randint(-1, 2, (90, 60)).float()
    found = by_both(outputs, {"logits": few_values}, torch.zeros(60, device=device), 4)
    assert_same(found)
    assert (
        by_both(outputs, {"logits": torch.zeros(3, 60)}, torch.zeros(60, device=device), 4)[1]["output 0"].tolist()
        == [[0, 1, 2, 3]] * 3
    )


@pytest.mark.parametrize("size", [1.0, 1e4, 1e30])
def test_an_extreme_bias_selects_and_does_not_weigh(by_both, device, size):
    bias = torch.zeros(60, device=device)
    bias[7], bias[3] = size, -size
    found = by_both(outputs, {"logits": routing(40, 60, 4)}, bias, 4)
    assert_same(found)
    ids = found[1]["output 0"]
    assert (ids == 7).any(1).all()
    assert not (ids == 3).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_every_token_chooses_different_experts_whatever_its_logits_are(monkeypatch, device, value):
    """Ids index memory: a run that diverges has to end with a loss that is not finite, not with a fault."""
    monkeypatch.setenv("MM_KERNELS", "triton")
    logits = torch.full((5, 60), value, device=device)
    logits[0, 3] = 0.0
    bias = torch.full((60,), value, device=device)
    for found in (route_and_count(logits, bias * 0, 4, 1.0), route_and_count(logits * 0, bias, 4, 1.0)):
        for ids in found.ids_TK.tolist():
            assert len(set(ids)) == 4
            assert all(0 <= expert < 60 for expert in ids)
        assert found.counts_E.sum().item() == 20


def test_no_tokens(by_both, device):
    found = by_both(outputs, {"logits": torch.zeros(0, 8)}, torch.zeros(8, device=device), 2)
    assert_same(found)


def test_two_runs_are_bitwise_equal(monkeypatch, device):
    monkeypatch.setenv("MM_KERNELS", "triton")
    logits = routing(200, 60, 4).to(device)
    runs = [route_and_count(logits, torch.zeros(60, device=device), 4, 2.5) for _ in range(2)]
    for a, b in zip(runs[0][:5], runs[1][:5], strict=True):
        assert torch.equal(a, b)
