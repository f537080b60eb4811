import pytest
import torch

from kernels.grouped_matmul_triton import IDLE, grouped_matmul, tile_table
from tests.kernels.comparing import assert_same


@pytest.mark.parametrize("counts", [[5, 0, 140], [0, 0, 3], [128, 128, 129], [0, 0, 0]])
def test_every_row_is_in_one_tile_of_its_expert(device, counts):
    used = torch.tensor(counts, dtype=torch.int32, device=device)
    starts = used.cumsum(0).int() - used
    covered = {expert: [] for expert in range(3)}
    for expert, row, end in tile_table(starts, used, sum(counts)).tolist():
        if expert != IDLE:
            assert end == sum(counts[: expert + 1])
            covered[expert] += range(row, min(row + 128, end))
    assert covered == {e: list(range(sum(counts[:e]), sum(counts[: e + 1]))) for e in range(3)}


def reference(x, weight, counts):
    """x and weight by expert, in a loop."""
    return torch.cat([rows @ matrix for rows, matrix in zip(x.split(counts), weight, strict=True)])


@pytest.mark.parametrize("counts", [[5, 0, 40], [0, 131, 2]])
@pytest.mark.parametrize(("inner", "outer"), [(16, 32), (72, 40)])
def test_product_and_both_gradients(by_both, monkeypatch, device, poison, counts, inner, outer):
    torch.manual_seed(0)
    leaves = {"x": torch.randn(sum(counts), inner), "weight": torch.randn(3, inner, outer)}
    used = torch.tensor(counts, dtype=torch.int32, device=device)
    starts = used.cumsum(0).int() - used

    def function(x, weight):
        import os

        if os.environ["MM_KERNELS"] == "reference":
            return reference(x, weight, counts)
        return grouped_matmul(x, weight, weight.detach(), starts, used)

    assert_same(by_both(function, leaves))
