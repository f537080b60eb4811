"""int4 weights as ExecuTorch's operators read them: codes and scales pass through, value for value.

`llama::quantized_moe_ffn` wants each expert as a block of torchao's universal format: a header, then for every 8 rows
and every group of 32 inputs the codes, 8 scales (float32) and 8 sums of codes (int32). Two chunks of 16 inputs make the
codes of a group; a chunk is 2 x 8 rows x 8 inputs, and of each 32 of these values byte j holds value j in its low and
value j + 16 in its high half, both plus 8. torchao's own packer is not in its wheels for x86.
"""

import torch
from torch import Tensor

MAGIC, UNIVERSAL = 6712, 1  # of torchao's header
ROWS, CHUNK, HALVES = 8, 16, 2
GROUP = 32


def pack_experts(codes: Tensor, scales: Tensor) -> Tensor:
    """int8 codes [E, N, K] and fp16 scales [E, N, K / 32] -> uint8 [E, bytes]; N is a multiple of 8, K of 32."""
    experts = codes.shape[0]
    grouped = codes.unflatten(1, (-1, ROWS)).unflatten(-1, (-1, GROUP // CHUNK, HALVES, CHUNK // HALVES))
    # [E, N / 8, row, groups, chunk, half, 8] -> [E, N / 8, groups, chunk, half, row, 8]
    values = (grouped.permute(0, 1, 3, 4, 5, 2, 6).flatten(4) + 8).view(torch.uint8).unflatten(-1, (-1, 2, 16))
    both = (values[..., 0, :] | values[..., 1, :] << 4).flatten(3)
    of_groups = scales.float().unflatten(1, (-1, ROWS)).transpose(2, 3)
    sums = codes.unflatten(1, (-1, ROWS)).unflatten(-1, (-1, GROUP)).sum(-1, dtype=torch.int32).transpose(2, 3)
    parts = [both, *(part.contiguous().view(torch.uint8) for part in (of_groups, sums))]
    header = torch.tensor([MAGIC, UNIVERSAL, 4, 0, 0, ROWS, CHUNK, HALVES] + [0] * 8, dtype=torch.int32)
    return torch.cat([header.view(torch.uint8).expand(experts, -1), torch.cat(parts, -1).flatten(1)], 1)


def pack_table(codes: Tensor) -> Tensor:
    """int8 codes [V, D] -> uint8 [V, D / 2] for `quantized_decomposed::embedding_4bit`: the first value is high."""
    shifted = (codes + 8).view(torch.uint8)
    return shifted[:, 0::2] << 4 | shifted[:, 1::2]
