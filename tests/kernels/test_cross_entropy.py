import torch

from kernels import cross_entropy
from kernels.cross_entropy import IGNORE, linear_cross_entropy, linear_cross_entropy_reference


def test_chunked_equals_the_reference_in_value_and_gradients(monkeypatch):
    monkeypatch.setattr(cross_entropy, "CHUNK_ROWS", 7)  # several chunks, the last one short
    torch.manual_seed(0)
    hidden, weight = torch.randn(30, 16), torch.randn(50, 16)
    labels = torch.randint(0, 50, (30,))
    labels[::4] = IGNORE
    results = []
    for function in (linear_cross_entropy, linear_cross_entropy_reference):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        loss = function(h, w, labels)
        (loss * 0.3).backward()
        results.append((loss.detach(), h.grad, w.grad))
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(linear_cross_entropy(hidden, weight, labels), results[1][0])


def test_nothing_to_score_is_zero_with_zero_gradients():
    hidden = torch.randn(4, 8, requires_grad=True)
    weight = torch.randn(10, 8, requires_grad=True)
    loss = linear_cross_entropy(hidden, weight, torch.full((4,), IGNORE))
    loss.backward()
    assert loss.item() == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_bfloat16_without_units_is_the_float32_loss_of_the_same_values(monkeypatch):
    monkeypatch.setattr("kernels.linear._multiplies_bfloat16", lambda: False)
    torch.manual_seed(0)
    hidden, weight = (torch.randn(rows, 16).bfloat16().requires_grad_() for rows in (30, 50))
    labels = torch.randint(0, 50, (30,))
    loss = linear_cross_entropy(hidden, weight, labels)
    loss.backward()
    wide = [t.detach().float().requires_grad_() for t in (hidden, weight)]
    want = linear_cross_entropy(*wide, labels)
    want.backward()
    assert torch.equal(loss, want)
    for got, exact in zip((hidden, weight), wide, strict=True):
        assert torch.equal(got.grad, exact.grad.bfloat16())


def test_gradients_of_the_reference():
    torch.manual_seed(0)
    hidden, weight = (torch.randn(n, 4, dtype=torch.float64, requires_grad=True) for n in (5, 7))
    labels = torch.tensor([0, 6, IGNORE, 2, 2])
    assert torch.autograd.gradcheck(lambda h, w: linear_cross_entropy_reference(h, w, labels), (hidden, weight))
