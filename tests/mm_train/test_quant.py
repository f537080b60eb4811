import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.router import route
from mm_train import config, quant
from mm_train.cli import UserError
from mm_train.model import MobileMoE
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
from mm_train.release import load_release, save_release
from mm_train.release_format import stored_tensors

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


def is_expert(name: str) -> bool:
    return ".experts." in name


def rounded(model: MobileMoE, expert_axis: int) -> MobileMoE:
    """A plain model of the values that an int4 file of `model` holds, tensor by tensor of the format's inventory."""
    copy = MobileMoE(model.config)
    copy.load_state_dict(model.state_dict())
    values = dict(copy.named_parameters())
    packed = {stored.source for stored in stored_tensors(model.config, "int4") if stored.role == "codes"}
    assert packed == {name for name, value in values.items() if value.ndim >= 2 and "router" not in name}
    with torch.no_grad():
        for name in packed:
            axis = expert_axis if is_expert(name) else -1
            codes, scales = quantise(values[name], axis)
            values[name].copy_(dequantise(unpack(pack(codes)), scales, axis))
    return copy


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    with torch.no_grad():  # choices that are not all about alike
        for layer in model.moe_layers():
            layer.router.weight.mul_(20)
            layer.expert_bias.copy_(torch.linspace(-0.1, 0.1, small_model.num_local_experts))
    return model.train()


def batch(small_model):
    torch.manual_seed(1)
    tokens = torch.randint(0, small_model.vocab_size, (2, 32))
    return tokens, tokens.roll(-1, 1), torch.zeros_like(tokens, dtype=torch.int32)


@pytest.mark.parametrize("axis", ["out", "in"])
def test_qat_computes_with_the_int4_file_and_learns_straight_through(model, small_model, axis):
    """Every linear, expert and the embedding, in lookup and head, bit for bit; router and norms as they are.

    The gradient of a weight is that of the value it was rounded to: the straight-through estimator.
    """
    plain = rounded(model, -1 if axis == "out" else -2)
    enable_fake_quant(model, FakeQuant.of(config.Quant(enabled=True, expert_group_axis=axis, activations_int8=False)))
    losses, wanted = model(*batch(small_model)), plain.train()(*batch(small_model))
    assert torch.equal(losses.cross_entropy_sum, wanted.cross_entropy_sum)
    assert torch.equal(losses.counts_LE, wanted.counts_LE)
    for result in (losses, wanted):
        (result.cross_entropy_sum + 1e-3 * result.z_loss_sum).backward()
    others = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        assert parameter.grad.any(), name
        assert torch.equal(parameter.grad, others[name].grad), name
    tokens = batch(small_model)[0]
    assert torch.equal(model.eval()(tokens), plain.eval()(tokens))


def test_the_axes_round_experts_differently_and_the_rest_alike(model):
    out, into = (dict(rounded(model, axis).named_parameters()) for axis in (-1, -2))
    assert {name for name in out if not torch.equal(out[name], into[name])} == {name for name in out if is_expert(name)}


def test_a_release_holds_what_qat_computed_with(model, tmp_path):
    save_release(model, tmp_path / "int4", "int4")
    released, computed = load_release(tmp_path / "int4", torch.float32), rounded(model, -1)
    for name, value in released.named_parameters():
        if value.ndim >= 2 and "router" not in name:
            assert torch.equal(value, dict(computed.named_parameters())[name]), name


def test_what_goes_into_every_matrix_product_is_int8_but_the_routers(model, small_model, monkeypatch):
    """A layer of experts against a loop over tokens; the count of the rest: q, k, v, o, gate, up, down, head."""
    plain = rounded(model, -1)
    enable_fake_quant(model, FakeQuant())
    layer, other = model.moe_layers()[0], plain.moe_layers()[0]
    x_TD = torch.randn(9, small_model.hidden_size)
    ids_TK, weights_TK = route(other.router(x_TD), *other.routing_options())  # of x as it is
    q8, experts, shared = fake_quantise_activations, other.experts, other.shared_expert
    want = torch.zeros_like(x_TD)
    for t in range(9):
        for expert, weight in zip(ids_TK[t].tolist(), weights_TK[t], strict=True):
            gate, up = (q8(x_TD[t]) @ experts.gate_up_proj[expert]).chunk(2)
            want[t] += weight * (q8(torch.nn.functional.silu(gate) * up) @ experts.down_proj[expert])
        gate, up = (q8(x_TD[t]) @ proj.weight.T for proj in (shared.gate_proj, shared.up_proj))
        want[t] += q8(torch.nn.functional.silu(gate) * up) @ shared.down_proj.weight.T
    torch.testing.assert_close(layer(x_TD)[0], want, rtol=1e-4, atol=1e-6)

    calls = []
    monkeypatch.setattr(quant, "fake_quantise_activations", lambda x: (calls.append(x.shape), q8(x))[1])
    model(*batch(small_model))
    in_a_layer = 4 + 3 + 2  # attention, shared expert, experts: into gate_up and into down
    assert len(calls) == small_model.num_hidden_layers * in_a_layer + 1
