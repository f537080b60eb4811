"""Triton kernels against their references: on a GPU where there is one, else in Triton's interpreter.

The interpreter is right in float32 only: 16 bits wait for a GPU (test_gpu.py).
"""

import pytest
import torch


@pytest.fixture
def by_both(monkeypatch, device):
    """Call a function by the reference and by Triton on the same inputs, with the gradients of a random projection.

    by_both(function, leaves, *others) -> two dicts of tensors: outputs by number, and the gradient of every named leaf.
    """

    def run(function, leaves, *others):
        results = []
        for kernels in ("reference", "triton"):
            monkeypatch.setenv("MM_KERNELS", kernels)
            mine = {name: leaf.detach().clone().to(device).requires_grad_() for name, leaf in leaves.items()}
            outputs = function(*mine.values(), *others)
            outputs = outputs if isinstance(outputs, tuple) else (outputs,)
            torch.manual_seed(1)
            differentiable = [out for out in outputs if out.requires_grad]
            sum((out * torch.randn(out.shape).to(device)).sum() for out in differentiable).backward()
            found = {f"output {i}": out.detach() for i, out in enumerate(outputs)}
            results.append(found | {f"d{name}": leaf.grad for name, leaf in mine.items()})
        return results

    return run


@pytest.fixture
def poison(monkeypatch):
    """Memory that is handed out unwritten holds NaN, or numbers out of range: whoever reads it is found."""
    empty_like, new_empty = torch.empty_like, torch.Tensor.new_empty

    def spoil(tensor):
        return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).max // 2)

    monkeypatch.setattr(torch, "empty_like", lambda *args, **kwargs: spoil(empty_like(*args, **kwargs)))
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda *args, **kwargs: spoil(new_empty(*args, **kwargs)))
