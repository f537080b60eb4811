"""What the tests of the Triton kernels share: inputs, and the comparison with the reference."""

import torch

from kernels.experts import experts, mixture
from kernels.permute import permute, plan_capacity, plan_dropless, unpermute


def assert_same(results, rtol=2e-5, atol=2e-6):
    """Compare what `by_both` returns, name by name; `atol` is in units of the largest element."""
    want, got = results
    assert got.keys() == want.keys()
    for name, expected in want.items():
        assert got[name].dtype == expected.dtype or not expected.is_floating_point(), name
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(
            got[name].to(expected.dtype),
            expected,
            rtol=rtol,
            atol=atol * max(scale, 1.0),
            msg=lambda m, name=name: f"{name}: {m}",
        )


def routing(tokens, experts, top_k, seed=0, load="random"):
    """Logits [T, E]: random; or all tokens to the first experts; or one expert that nobody chooses."""
    torch.manual_seed(seed)
    logits = torch.randn(tokens, experts)
    if load == "one":
        logits[:, :top_k] += 50
    elif load == "empty":
        logits[:, experts // 2] -= 50
    return logits


def by_experts(found, x, weights, gate_up, down, capacity=0, fused=True):
    """What a mixture layer makes of a routing: y [T, D], and the rows of each expert, padding included."""
    counts = found.counts_E
    if capacity:
        plan = plan_capacity(found.ids_TK, counts, capacity, found.places)
        counts = torch.full_like(counts, capacity)
    else:
        plan = plan_dropless(found.ids_TK, counts, found.places)
    if fused:
        return mixture(x, weights, plan, counts, gate_up, down), counts
    return unpermute(experts(permute(x, plan), gate_up, down, counts), weights, plan), counts
