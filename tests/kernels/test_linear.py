import pytest
import torch

from kernels.linear import FEW_ROWS, linear


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


def test_a_wide_weight_is_cast_to_the_activations():
    x, weight = torch.randn(3, 64).bfloat16(), torch.randn(32, 64)
    assert torch.equal(linear(x, weight), torch.nn.functional.linear(x, weight.bfloat16()))
