"""The mixture layer by both kinds of kernels: what a training step sees must not depend on which one runs."""

import pytest
import torch

from mm_train import config
from mm_train.model import MobileMoE
from mm_train.quant import FakeQuant, enable_fake_quant

NETWORK = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 32,
    "intermediate_size_mlp": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
}


def train(network, device, capacity=None, quantised=False, steps=2, dtype=torch.float32, recompute=False):
    """Losses, and of the last step the gradient norms and what the router found out."""
    model = MobileMoE(config.Model(**network), dtype).to(device)
    model.init_weights(0)
    model.train()
    model.recompute = recompute
    for layer in model.moe_layers():
        layer.dispatcher.capacity_factor = capacity
    if quantised:
        enable_fake_quant(model, FakeQuant())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(0)
    tokens = torch.randint(0, network["vocab_size"], (2, 33)).to(device)
    losses = []
    for _ in range(steps):
        sums = model(tokens[:, :-1], tokens[:, 1:])
        loss = (sums.cross_entropy_sum + 1e-3 * sums.z_loss_sum) / 64
        optimizer.zero_grad()
        loss.backward()
        gradients = {name: p.grad.float().norm().item() for name, p in model.named_parameters()}
        optimizer.step()
        losses.append(loss.item())
    return losses, gradients, sums


def by_both(monkeypatch, network, device, **options):
    """`train` by the reference, and by Triton."""
    results = []
    for kernels in ("reference", "triton"):
        monkeypatch.setenv("MM_KERNELS", kernels)
        results.append(train(network, device, **options))
    return results


@pytest.mark.parametrize(
    ("changes", "options"),
    [
        ({}, {}),
        ({}, {"capacity": 1.0}),
        ({}, {"quantised": True}),
        ({}, {"capacity": 1.0, "recompute": True}),
        ({"scoring_func": "softmax", "intermediate_size_mlp": 0}, {"capacity": 1.0, "quantised": True}),
    ],
    ids=["dropless", "drop and pad", "quantised", "recomputed", "softmax, quantised, drop and pad"],
)
def test_training_does_not_depend_on_the_kernels(monkeypatch, device, changes, options):
    (losses, gradients, facts), triton = by_both(monkeypatch, NETWORK | changes, device, **options)
    assert triton[0] == pytest.approx(losses, rel=1e-6)
    assert triton[1] == pytest.approx(gradients, rel=1e-4)
    assert torch.equal(triton[2].counts_LE, facts.counts_LE)
    assert torch.equal(triton[2].dropped_L, facts.dropped_L)
    assert facts.dropped_L.any() == ("capacity" in options)
    torch.testing.assert_close(triton[2].entropy_sum_L, facts.entropy_sum_L, rtol=1e-5, atol=0)


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 0.01), (torch.bfloat16, 0.1)])
def test_two_hundred_steps_have_the_same_loss_curve(monkeypatch, device, dtype, tolerance):
    wide = {"hidden_size": 128, "intermediate_size": 64, "intermediate_size_mlp": 128, "num_local_experts": 16}
    (losses, *_), triton = by_both(monkeypatch, NETWORK | wide, device, steps=200, dtype=dtype)
    assert losses[-1] < losses[0] / 2
    assert triton[0] == pytest.approx(losses, abs=tolerance)  # nats
