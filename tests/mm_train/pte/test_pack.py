"""The bytes of ExecuTorch's formats, beside the plain loops that they are defined by."""

import struct

import torch

from mm_train.pte.pack import pack_experts, pack_table
from mm_train.quant import quantise


def by_loops(codes, scales) -> bytes:
    """torchao's universal format of one matrix [N, K]: 8 rows, 16 inputs at a time, in two halves of 8."""
    out = struct.pack("<16i", 6712, 1, 4, 0, 0, 8, 16, 2, *[0] * 8)
    rows, width = codes.shape
    for row in range(0, rows, 8):
        for group in range(width // 32):
            for chunk in range(2):
                values = []
                for half in range(2):
                    for r in range(row, row + 8):
                        start = group * 32 + chunk * 16 + half * 8
                        values += [int(code) + 8 for code in codes[r, start : start + 8]]
                for part in range(0, 128, 32):
                    out += bytes(values[part + j] | values[part + 16 + j] << 4 for j in range(16))
            out += struct.pack("<8f", *(float(scales[r, group]) for r in range(row, row + 8)))
            sums = (int(codes[r, group * 32 : group * 32 + 32].int().sum()) for r in range(row, row + 8))
            out += struct.pack("<8i", *sums)
    return out


def test_experts_are_packed_as_torchao_does():
    codes, scales = quantise(torch.randn(3, 24, 96))
    assert codes.min() == -8
    packed = pack_experts(codes, scales)
    assert packed.dtype == torch.uint8
    for expert in range(3):
        assert packed[expert].numpy().tobytes() == by_loops(codes[expert], scales[expert])


def test_views_of_other_orders_are_packed_alike():
    codes, scales = quantise(torch.randn(2, 64, 16), -2)
    turned = [part.transpose(1, 2) for part in (codes, scales)]
    assert torch.equal(pack_experts(*turned), pack_experts(*(part.contiguous() for part in turned)))


def test_a_table_holds_its_first_value_high():
    codes = torch.tensor([[-8, 7, 0, -1]], dtype=torch.int8)
    assert pack_table(codes).tolist() == [[0x0F, 0x87]]
