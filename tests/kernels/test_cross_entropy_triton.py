import pytest
import torch

from kernels import cross_entropy_triton
from kernels.cross_entropy import IGNORE, linear_cross_entropy
from tests.kernels.comparing import assert_same


@pytest.fixture
def small_blocks(monkeypatch):
    """Several chunks of rows, the last one short, and several blocks of classes."""
    monkeypatch.setattr(cross_entropy_triton, "CHUNK_ELEMENTS", 7 * 50)
    monkeypatch.setattr(cross_entropy_triton, "BLOCK_V", 16)


@pytest.mark.parametrize("scored", ["all", "some", "none"])
def test_equals_the_reference_in_value_and_gradients(by_both, device, small_blocks, poison, scored):
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(30, 16), "weight": torch.randn(50, 16)}
    labels = torch.randint(0, 50, (30,), device=device)
    if scored != "all":
        labels[:: 4 if scored == "some" else 1] = IGNORE
    found = by_both(linear_cross_entropy, leaves, labels)
    assert_same(found)
    if scored == "none":
        assert found[1]["output 0"].item() == 0
        assert not found[1]["dweight"].any()


def test_large_logits_do_not_overflow(by_both, device, small_blocks):
    torch.manual_seed(0)
    leaves = {"hidden": torch.randn(9, 16) * 100, "weight": torch.randn(50, 16) * 100}
    assert_same(by_both(linear_cross_entropy, leaves, torch.randint(0, 50, (9,), device=device)), rtol=1e-4)


def test_without_gradients_the_value_is_the_same(monkeypatch, device, small_blocks):
    monkeypatch.setenv("MM_KERNELS", "triton")
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16, device=device), torch.randn(50, 16, device=device)
    labels = torch.randint(0, 50, (30,), device=device)
    value = linear_cross_entropy(hidden, weight, labels)
    assert torch.equal(linear_cross_entropy(hidden.requires_grad_(), weight, labels).detach(), value)


def test_a_label_that_is_no_class_makes_the_loss_nan(monkeypatch, device, small_blocks):
    """A step with such a loss is skipped; reading what lies beyond the logits would go unseen."""
    monkeypatch.setenv("MM_KERNELS", "triton")
    hidden, weight = torch.randn(3, 16, device=device), torch.randn(50, 16, device=device)
    assert linear_cross_entropy(hidden, weight, torch.tensor([1, 50, 2], device=device)).isnan()
