"""llama.cpp's Q4_0 blocks, which are exactly the int4 grid of training: 32 weights q * d, q in -8..7, d in float16.

A block is d and 16 bytes; byte j holds q[j] + 8 in its low and q[j + 16] + 8 in its high half.
"""

import numpy as np
import torch
from torch import Tensor

from mm_train.gguf.layout import BLOCK, BLOCK_BYTES


def blocks(codes: Tensor, scales: Tensor) -> np.ndarray:
    """int8 codes [..., n] and fp16 scales [..., n / 32] -> uint8 [..., n / 32 * 18], value for value."""
    grouped = (codes.view(torch.uint8) + 8).unflatten(-1, (-1, BLOCK))  # modulo 256: -8 becomes 0
    both = grouped[..., : BLOCK // 2] | (grouped[..., BLOCK // 2 :] << 4)
    # a copy in order: a dimension of length 1 may have any stride, and `view` minds
    heads = scales.clone(memory_format=torch.contiguous_format).view(torch.uint8).unflatten(-1, (-1, 2))
    return torch.cat([heads, both], dim=-1).flatten(-2).numpy()


def codes_and_scales(stored: np.ndarray) -> tuple[Tensor, Tensor]:
    """Inverse of `blocks`."""
    grouped = torch.from_numpy(np.array(stored)).unflatten(-1, (-1, BLOCK_BYTES))
    scales = grouped[..., :2].contiguous().view(torch.float16).squeeze(-1)
    both = grouped[..., 2:]
    codes = torch.cat([both & 0xF, both >> 4], dim=-1).to(torch.int8) - 8
    return codes.flatten(-2), scales
