import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train.cli import UserError
from mm_train.quant import (
    FakeQuant,
    Linear,
    dequantise,
    enable_fake_quant,
    fake_quantise,
    fake_quantise_activations,
    pack,
    quantise,
    unpack,
)

magnitudes = st.sampled_from([1e-12, 1e-6, 1e-3, 1.0, 1e3, 1e6])


def by_hand(group):
    """The format's rule on one group of 32, in Python floats and numpy's fp16."""
    import numpy as np

    scale = np.float16(min(np.float32(2) * np.float32(max(abs(x) for x in group)) / np.float32(15), 65504))
    if scale == 0:
        return [0] * 32, 0.0
    return [int(max(-8, min(7, np.round(np.float32(x) / np.float32(scale))))) for x in group], float(scale)


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), magnitudes)
def test_codes_and_scales_follow_the_rule(seed, magnitude):
    torch.manual_seed(seed)
    weight = torch.randn(2, 64) * magnitude
    codes, scales = quantise(weight)
    for row in range(2):
        for group in range(2):
            want_codes, want_scale = by_hand(weight[row, group * 32 : group * 32 + 32].tolist())
            assert codes[row, group * 32 : group * 32 + 32].tolist() == want_codes
            assert scales[row, group].item() == want_scale


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 10_000), magnitudes, st.sampled_from([-1, -2]))
def test_fake_quantisation_is_quantise_pack_unpack_dequantise_bit_for_bit(seed, magnitude, axis):
    torch.manual_seed(seed)
    weight = torch.randn(3, 64, 96) * magnitude
    codes, scales = quantise(weight, axis)
    assert torch.equal(unpack(pack(codes)), codes)
    assert torch.equal(fake_quantise(weight, axis), dequantise(unpack(pack(codes)), scales, axis))


def test_groups_run_along_the_axis():
    weight = torch.ones(1, 64, 32)
    weight[0, :32] = 100
    assert quantise(weight, -2)[1].shape == (1, 2, 32)
    assert quantise(weight, -1)[1].shape == (1, 64, 1)
    torch.testing.assert_close(
        dequantise(*quantise(weight, -2), -2)[0, 32:], torch.full((32, 32), 7 * 2 / 15), rtol=1e-3, atol=0
    )


def test_nibbles_low_first_twos_complement():
    assert pack(torch.tensor([[-8, 7, 1, -1]], dtype=torch.int8)).tolist() == [[0x78, 0xF1]]


def test_an_all_zero_group_is_zero():
    codes, scales = quantise(torch.zeros(1, 32))
    assert not codes.any()
    assert not scales.any()
    assert not fake_quantise(torch.zeros(1, 32)).any()


def test_gradient_passes_straight_through():
    weight = torch.randn(2, 32, requires_grad=True)
    fake_quantise(weight).mul(torch.arange(64.0).view(2, 32)).sum().backward()
    assert torch.equal(weight.grad, torch.arange(64.0).view(2, 32))


def test_activations_keep_255_levels_a_row():
    x = torch.randn(4, 64) * torch.tensor([[1e-3], [1.0], [50.0], [0.0]])
    y = fake_quantise_activations(x)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((y - x).abs() <= step / 2 * 1.0001).all()
    assert (y[3] == 0).all()
    torch.testing.assert_close(y.abs().amax(-1), x.abs().amax(-1))


def test_bad_shape_and_bad_values_are_refused():
    with pytest.raises(UserError, match="axis -1 \\(33\\) is not a multiple of 32"):
        quantise(torch.zeros(1, 33))
    with pytest.raises(UserError, match="NaN or infinity"):
        quantise(torch.full((1, 32), torch.nan))


def test_a_linear_computes_with_quantised_weights_and_inputs():
    torch.manual_seed(0)
    linear = Linear(64, 32)
    torch.nn.init.normal_(linear.weight)
    x = torch.randn(5, 64)
    enable_fake_quant(linear, FakeQuant())
    want = fake_quantise_activations(x) @ fake_quantise(linear.weight).T
    torch.testing.assert_close(linear(x), want)
    enable_fake_quant(linear, FakeQuant(activations_int8=False))
    torch.testing.assert_close(linear(x), x @ fake_quantise(linear.weight).T)
