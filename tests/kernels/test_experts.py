import pytest
import torch

from kernels.experts import _SwiGLU, _swiglu, experts, experts_of_few_tokens, experts_reference


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


def test_widths_that_a_grouped_matmul_cannot_take():
    torch.manual_seed(0)
    x, gate_up, down = torch.randn(9, 34), torch.randn(3, 34, 36), torch.randn(3, 18, 34)
    counts = torch.tensor([4, 0, 5])
    torch.testing.assert_close(experts(x, gate_up, down, counts), experts_reference(x, gate_up, down, counts))


@pytest.mark.parametrize("counts", [[1, 0, 3], [0, 0, 1], [30, 0, 11]])
def test_float32_rows_and_narrow_weights_give_the_reference_to_rounding(counts):
    """Inference on a CPU: weights in bfloat16 and transposed in memory."""
    torch.manual_seed(0)
    x = torch.randn(sum(counts), 32)
    gate_up, down = (torch.randn(3, 32, width).bfloat16() * 0.2 for width in (64, 32))
    transposed = [w.transpose(1, 2).contiguous().transpose(1, 2) for w in (gate_up, down)]
    want = experts_reference(x, gate_up.float(), down.float(), torch.tensor(counts))
    got = experts(x, *transposed, torch.tensor(counts))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, want, rtol=0.03, atol=0.03 * want.std().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_tokens_one_by_one_give_the_weighted_sum_of_their_experts(dtype):
    torch.manual_seed(0)
    x, weights = torch.randn(3, 32).to(dtype), torch.rand(3, 2)
    gate_up, down = (torch.randn(4, 32, width).to(dtype) * 0.2 for width in (64, 32))
    ids = torch.tensor([[0, 3], [3, 1], [0, 2]])
    got = experts_of_few_tokens(x, ids, weights, gate_up, down)
    want = torch.zeros(3, 32)
    for t in range(3):
        for k in range(2):
            counts = torch.bincount(ids[t, k][None], minlength=4)
            y = experts_reference(x[t : t + 1].float(), gate_up.float(), down.float(), counts)[0]
            want[t] += weights[t, k] * y
    assert got.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 else 0.03
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * want.std().item())


@pytest.mark.parametrize("units", [True, False])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("counts", [[50, 0, 31], [2, 1, 0]])
def test_bfloat16_rows_give_the_reference_to_rounding(counts, weight_dtype, units, monkeypatch):
    """Whether the processor has units for bfloat16, or the MLP is computed in float32 and rounded."""
    monkeypatch.setattr("kernels.linear._multiplies_bfloat16", lambda: units)
    torch.manual_seed(0)
    inputs = [torch.randn(sum(counts), 32).bfloat16(), torch.randn(3, 32, 64) * 0.2, torch.randn(3, 32, 32) * 0.2]
    inputs[1:] = [weight.to(weight_dtype) for weight in inputs[1:]]
    dy = torch.randn(sum(counts), 32).bfloat16()
    results = []
    for function, dtype in ((experts, None), (experts_reference, torch.float64)):
        leaves = [t.to(dtype or t.dtype, copy=True).requires_grad_() for t in inputs]
        out = function(*leaves, torch.tensor(counts))
        out.backward(dy.to(out.dtype))
        results.append([out.detach(), *(leaf.grad for leaf in leaves)])
    assert [t.dtype for t in results[0]] == [torch.bfloat16, *(t.dtype for t in inputs)]
    for got, want in zip(*results, strict=True):
        assert (got.double() - want).norm() < 0.01 * want.norm()  # a few roundings of 2^-9


def test_swiglu_is_autograds_to_the_last_bit_and_keeps_its_input_alone():
    torch.manual_seed(0)
    hidden, dout = torch.randn(30, 64), torch.randn(30, 32)
    results, kept = [], []
    for function in (_SwiGLU.apply, _swiglu):
        leaf = hidden.clone().requires_grad_()
        saved: dict[int, torch.Tensor] = {}  # by storage

        def pack(tensor, saved=saved):
            saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = function(leaf)
        out.backward(dout)
        results.append((out.detach(), leaf.grad))
        kept.append(sum(t.untyped_storage().nbytes() for t in saved.values()))
    for got, want in zip(*results, strict=True):
        assert torch.equal(got, want)
    assert kept == [hidden.nbytes, hidden.nbytes + dout.nbytes]
    leaf = torch.randn(3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(_SwiGLU.apply, leaf)
