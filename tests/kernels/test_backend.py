import pytest
import torch

from kernels.backend import use_triton
from mm_train.cli import command


def test_a_cpu_takes_the_reference_unless_told_otherwise(monkeypatch):
    x = torch.zeros(1)
    monkeypatch.delenv("MM_KERNELS", raising=False)
    assert not use_triton(x)
    monkeypatch.setenv("MM_KERNELS", "triton")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert use_triton(x)
    assert not use_triton(x.double())  # which the kernels do not know
    monkeypatch.setenv("MM_KERNELS", "reference")
    assert not use_triton(x)


def test_what_cannot_be_is_said(monkeypatch):
    monkeypatch.setenv("MM_KERNELS", "fast")
    with pytest.raises(ValueError, match="MM_KERNELS is 'fast'; it must be 'reference' or 'triton', or not set"):
        use_triton(torch.zeros(1))
    monkeypatch.setenv("MM_KERNELS", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(ValueError, match="set TRITON_INTERPRET=1"):
        use_triton(torch.zeros(1))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr("kernels.backend.TRITON_IS_INSTALLED", False)
    with pytest.raises(ValueError, match="pip install triton, or set MM_KERNELS=reference"):
        use_triton(torch.zeros(1))


def test_a_command_says_so_in_one_line(monkeypatch, capsys):
    monkeypatch.setenv("MM_KERNELS", "fast")
    assert command(lambda: use_triton(torch.zeros(1)))() == 2
    assert capsys.readouterr().err == "error: MM_KERNELS is 'fast'; it must be 'reference' or 'triton', or not set\n"
