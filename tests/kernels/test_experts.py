import pytest
import torch

from kernels.experts import experts, experts_reference


@pytest.mark.parametrize("counts", [[5, 3, 8], [0, 16, 0], [1, 0, 15], [0, 0, 0]])
def test_grouped_equals_the_loop_in_output_and_every_gradient(counts):
    torch.manual_seed(0)
    inputs = {
        "x": torch.randn(sum(counts), 32),
        "gate_up": torch.randn(3, 32, 64) * 0.1,
        "down": torch.randn(3, 32, 32) * 0.1,
    }
    results = []
    for function in (experts, experts_reference):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
        out = function(*leaves.values(), torch.tensor(counts))
        out.square().sum().backward()
        results.append({"out": out} | {name: leaf.grad for name, leaf in leaves.items()})
    for name, want in results[1].items():
        torch.testing.assert_close(
            results[0][name], want, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_gate_comes_first_and_the_weight_of_an_expert_serves_its_rows_only():
    x = torch.tensor([[1.0] * 4, [2.0] * 4])
    gate_up = torch.zeros(2, 4, 8)
    gate_up[0, :, :4], gate_up[0, :, 4:] = 0.25, 0.5  # expert 0: gate 1, up 2 for a row of ones
    down = torch.eye(4).repeat(2, 1, 1)
    out = experts_reference(x, gate_up, down, torch.tensor([1, 1]))
    torch.testing.assert_close(out[0], torch.full((4,), torch.nn.functional.silu(torch.tensor(1.0)).item() * 2))
    assert (out[1] == 0).all()


def test_reference_gradients():
    torch.manual_seed(0)
    leaves = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in ((5, 4), (2, 4, 6), (2, 3, 4))]
    assert torch.autograd.gradcheck(lambda *args: experts_reference(*args, torch.tensor([2, 3])), leaves)
