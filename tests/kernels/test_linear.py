import pytest
import torch
import torch.nn.functional as F

from kernels.linear import FEW_ROWS, better_in_float32, linear


@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 64), (2, 3, 64), (FEW_ROWS, 64), (FEW_ROWS + 1, 64), (5, 7, 64)])
def test_a_narrow_weight_meets_few_rows_in_its_dtype_and_many_in_theirs(narrow, shape):
    torch.manual_seed(0)
    x, weight = torch.randn(shape), torch.randn(32, 64).to(narrow)
    y = linear(x, weight)
    assert y.dtype == torch.float32
    few = x.numel() // 64 <= FEW_ROWS
    want = (x.to(narrow).float() if few else x) @ weight.float().T  # few rows: x is rounded, and so is the result
    torch.testing.assert_close(y, want, rtol=2**-8 if few else 1e-5, atol=2**-6 if few else 1e-5)


@pytest.fixture(params=[True, False], ids=["bfloat16 units", "none"])
def units(request, monkeypatch) -> bool:
    """Whether the processor passes for one that multiplies bfloat16 matrices."""
    monkeypatch.setattr("kernels.linear._multiplies_bfloat16", lambda: request.param)
    return request.param


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [3, FEW_ROWS + 1])
def test_bfloat16_activations(rows, weight_dtype, units):
    """In their own dtype, or exactly the rounded product in float32 where that is faster."""
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 64).bfloat16(), torch.randn(32, 64).to(weight_dtype)
    y = linear(x, weight)
    assert y.dtype == torch.bfloat16
    if units or (weight_dtype == torch.bfloat16 and rows <= FEW_ROWS):
        assert torch.equal(y, F.linear(x, weight.bfloat16()))
    else:
        assert torch.equal(y, F.linear(x.float(), weight.float()).bfloat16())


def test_gradients_of_bfloat16_activations(units):
    torch.manual_seed(0)
    x, weight, dy = torch.randn(20, 64).bfloat16(), torch.randn(32, 64), torch.randn(20, 32).bfloat16()
    exact = dy.double() @ weight.double(), dy.double().T @ x.double()
    leaves = [t.requires_grad_() for t in (x, weight)]
    linear(*leaves).backward(dy)
    for leaf, want in zip(leaves, exact, strict=True):
        assert leaf.grad.dtype == leaf.dtype
        assert (leaf.grad.double() - want).norm() < 2**-8 * want.norm()


def test_the_processor_is_asked():
    x = torch.zeros(1)
    assert not better_in_float32(x)
    assert better_in_float32(x.bfloat16()) == (not torch.ops.mkldnn._is_mkldnn_bf16_supported())
