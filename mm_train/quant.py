"""int4-g32 and int8 dynamic quantisation: the only definition, shared by training, export and evaluation.

Format mobilemoe-int4-g32: groups of 32 along one axis, value = q * scale with q in -8..7 and an fp16 scale, no zero
point. The released format fixes the layout; what it leaves open is decided here, once:

- scale = fp16(2 max|w| / 15), computed in float32 and rounded to fp16 *before* it divides, so that codes fit the scale
  that is stored; clamped to the largest finite fp16;
- codes = clamp(round(w / scale), -8, 7), ties to even;
- a group whose scale is 0 (all zeros, or below the smallest fp16) has codes 0.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels.cross_entropy import linear_cross_entropy
from kernels.experts import experts, mixture
from kernels.linear import linear
from kernels.permute import Plan
from mm_train import config
from mm_train.cli import UserError
from mm_train.rules import INT4_GROUP

QMIN, QMAX = -8, 7


def quantise(weight: Tensor, axis: int = -1) -> tuple[Tensor, Tensor]:
    """Codes (int8 in -8..7, shape of `weight`) and scales (fp16, `axis` shrunk by 32).

    Raises UserError when the length along `axis` is no multiple of 32, or when a value is not finite.
    """
    length = weight.shape[axis]
    if length % INT4_GROUP:
        raise UserError(
            f"cannot quantise shape {tuple(weight.shape)}: axis {axis} ({length}) is not a multiple of {INT4_GROUP}"
        )
    groups = _grouped(weight.float(), axis)
    largest = groups.abs().amax(-1)
    if not torch.isfinite(largest).all():
        raise UserError(f"cannot quantise a tensor of shape {tuple(weight.shape)}: it holds NaN or infinity")
    codes, scales = _codes(groups, largest)
    return _ungrouped(codes, axis).to(torch.int8), scales.movedim(-1, axis)


def dequantise(codes: Tensor, scales: Tensor, axis: int = -1) -> Tensor:
    """float32 values q * scale."""
    groups = _grouped(codes.float(), axis) * scales.float().movedim(axis, -1).unsqueeze(-1)
    return _ungrouped(groups, axis).contiguous()


def codes_of(weight: Tensor, scales: Tensor, axis: int = -1) -> Tensor | None:
    """int8 codes with which `dequantise` gives exactly `weight`, in its dtype; None when there are none.

    Codes of groups whose scale is 0 are 0, whatever they were.
    """
    codes = dequantise(weight.float(), scales.float().reciprocal().masked_fill_(scales == 0, 0.0), axis).round_()
    codes = codes.clamp_(QMIN, QMAX).to(torch.int8)
    return codes if torch.equal(dequantise(codes, scales, axis).to(weight.dtype), weight) else None


def fake_quantise(weight: Tensor, axis: int = -1) -> Tensor:
    """dequantise(quantise(weight)) in the dtype of `weight`, with a straight-through gradient."""
    return _FakeQuantise.apply(weight, axis)


def pack(codes: Tensor) -> Tensor:
    """int8 codes [..., n] -> uint8 [..., n / 2]: element 2b in the low nibble of byte b, 2b + 1 in the high one."""
    nibbles = codes.view(torch.uint8) & 0xF
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4)


def unpack(packed: Tensor) -> Tensor:
    """Inverse of `pack`."""
    both = packed.view(torch.int8)  # shifting a signed byte right keeps the sign
    return torch.stack([(both << 4) >> 4, both >> 4], dim=-1).flatten(-2)


def fake_quantise_activations(x: Tensor) -> Tensor:
    """int8 symmetric quantisation with one dynamic scale a row (token), straight-through gradient."""
    return _FakeQuantiseActivations.apply(x)


def _grouped(x: Tensor, axis: int) -> Tensor:
    """`axis` last and split into groups: [..., n / 32, 32]."""
    return x.movedim(axis, -1).unflatten(-1, (-1, INT4_GROUP))


def _ungrouped(groups: Tensor, axis: int) -> Tensor:
    return groups.flatten(-2).movedim(-1, axis)


def _codes(groups: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """Float codes of grouped values and their fp16 scales."""
    scales = (2 * largest / 15).clamp_(max=torch.finfo(torch.float16).max).half()
    divisor = scales.float().masked_fill_(scales == 0, torch.inf)  # x / inf = 0: empty groups get code 0
    return (groups / divisor.unsqueeze(-1)).round_().clamp_(QMIN, QMAX), scales


class _FakeQuantise(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight, axis):
        groups = _grouped(weight.float(), axis)
        codes, scales = _codes(groups, groups.abs().amax(-1))
        return _ungrouped(codes.mul_(scales.float().unsqueeze(-1)), axis).to(weight.dtype).contiguous()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _FakeQuantiseActivations(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        scale = x.abs().amax(-1, keepdim=True).float().clamp_(min=1e-12) / 127
        return ((x.float() / scale).round_() * scale).to(x.dtype)

    @staticmethod
    def backward(ctx, grad):
        return grad


@dataclass(frozen=True)
class FakeQuant:
    """How a module sees its weights and inputs in quantisation-aware training. The router has none: it stays exact."""

    expert_axis: int = -1  # of [E, in, out]: -1 groups along out (the release format), -2 along in (device formats)
    activations_int8: bool = True

    @classmethod
    def of(cls, quant: config.Quant) -> "FakeQuant":
        return cls(-1 if quant.expert_group_axis == "out" else -2, quant.activations_int8)

    def input(self, x: Tensor) -> Tensor:
        return fake_quantise_activations(x) if self.activations_int8 else x

    def experts(self, x_RD: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, counts_E: Tensor) -> Tensor:
        """kernels.experts.experts on fake-quantised weights and inputs (both of the MLP's matmuls)."""
        gate_up, down = (fake_quantise(w, self.expert_axis) for w in (gate_up_EDF, down_EFD))
        return experts(self.input(x_RD), gate_up, down, counts_E, self.input)

    def mixture(
        self, x_TD: Tensor, weights_TK: Tensor, plan: Plan, counts_E: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor
    ) -> Tensor:
        """kernels.experts.mixture, likewise: a token is quantised once, not once an expert."""
        gate_up, down = (fake_quantise(w, self.expert_axis) for w in (gate_up_EDF, down_EFD))
        return mixture(self.input(x_TD), weights_TK, plan, counts_E, gate_up, down, self.input)


class Linear(nn.Module):
    """y = x W^T with W [out, in], no bias; quantisation-aware when `fake_quant` is set."""

    fake_quant: FakeQuant | None = None

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(out_features, in_features))

    def forward(self, x: Tensor) -> Tensor:
        if self.fake_quant is None:
            return linear(x, self.weight)
        return linear(self.fake_quant.input(x), fake_quantise(self.weight))


class Embedding(nn.Module):
    """Token table [V, D], tied to the head; both uses see the same (fake-quantised) values."""

    fake_quant: FakeQuant | None = None

    def __init__(self, num_embeddings: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_embeddings, width))

    def table(self) -> Tensor:
        """The values that lookup and head use, [V, D]."""
        return self.weight if self.fake_quant is None else fake_quantise(self.weight)

    def lookup(self, tokens: Tensor, table_VD: Tensor) -> Tensor:
        """Rows of `table()`, [..., D]."""
        return F.embedding(tokens, table_VD)

    def cross_entropy_sum(self, hidden_ND: Tensor, table_VD: Tensor, labels_N: Tensor) -> Tensor:
        """Loss of the tied head, see kernels.cross_entropy.linear_cross_entropy."""
        return linear_cross_entropy(self.head_input(hidden_ND), table_VD, labels_N)

    def head_input(self, x: Tensor) -> Tensor:
        """Hidden states as the head sees them."""
        return x if self.fake_quant is None else self.fake_quant.input(x)


def enable_fake_quant(model: nn.Module, fake_quant: FakeQuant) -> None:
    """Make every linear, embedding and expert of `model` quantisation-aware, in place."""
    for module in model.modules():
        if hasattr(type(module), "fake_quant"):
            setattr(module, "fake_quant", fake_quant)  # noqa: B010 - nn.Module has no such attribute for a type checker
