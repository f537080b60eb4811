"""Q4_0 blocks, byte by byte and back."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_train.gguf.q4_0 import blocks, codes_and_scales
from mm_train.quant import dequantise, quantise


def test_a_block_written_by_hand():
    codes = torch.arange(32, dtype=torch.int8) % 16 - 8
    scales = torch.tensor([0.5], dtype=torch.float16)
    stored = blocks(codes, scales)
    assert stored.tobytes()[:2] == np.float16(0.5).tobytes()
    # q[j] + 8 in the low half, q[j + 16] + 8 in the high one; here both count 0..15
    assert list(stored[2:]) == [value | value << 4 for value in range(16)]


@given(seed=st.integers(0, 2**31), shape=st.sampled_from([(32,), (3, 64), (2, 5, 96), (1, 1, 32)]))
def test_there_and_back(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-8, 8, shape, generator=generator, dtype=torch.int8)
    scales = torch.rand(*shape[:-1], shape[-1] // 32, generator=generator).half()
    back = codes_and_scales(blocks(codes, scales))
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scales)


def test_llama_cpp_reads_the_values_of_training():
    gguf = pytest.importorskip("gguf")
    codes, scales = quantise(torch.randn(4, 128))
    theirs = gguf.quants.dequantize(blocks(codes, scales), gguf.GGMLQuantizationType.Q4_0)
    assert np.array_equal(theirs, dequantise(codes, scales).numpy())
