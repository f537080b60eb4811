"""Muon against torch's own and a slow reference in float64."""

import math

import pytest
import torch
from torch import Tensor
from torch.optim._muon import Muon

from mm_train import config
from mm_train.engine import PlainEngine
from mm_train.inventory import tensors
from mm_train.model import MobileMoE
from mm_train.muon import CHUNK, COEFFICIENTS, Matrices, MuonAdamW, Whole, matrices_of, newton_schulz
from mm_train.optim import parameter_groups
from mm_train.optim_groups import MUON_PARTS
from mm_train.sharding import ALONE


def slow_newton_schulz(matrix: Tensor) -> Tensor:
    """By singular values: the iteration is a polynomial of each of them."""
    u, s, v = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.norm()
    a, b, c = COEFFICIENTS
    for _ in range(5):
        s = a * s + b * s**3 + c * s**5
    return u @ torch.diag(s) @ v


@pytest.mark.parametrize(("rows", "columns"), [(24, 64), (64, 24), (48, 48), (1, 7)])
def test_each_matrix_of_a_stack_is_what_the_iteration_makes_of_its_singular_values(rows, columns):
    stack = torch.randn(5, rows, columns) * torch.tensor([1e-6, 1e-3, 1.0, 1e3, 1e6]).view(5, 1, 1)
    ours = newton_schulz(stack, torch.float32)
    for mine, matrix in zip(ours, stack, strict=True):
        torch.testing.assert_close(mine.double(), slow_newton_schulz(matrix), atol=2e-5, rtol=0)


def test_the_update_is_nearly_orthogonal():
    for dtype, tolerance in ((torch.float32, 0.35), (torch.bfloat16, 0.36)):
        values = torch.linalg.svdvals(newton_schulz(torch.randn(8, 32, 96), dtype).float())
        assert 1 - tolerance < values.min() <= values.max() < 1 + tolerance, dtype
    gram = torch.bmm(x := newton_schulz(torch.randn(8, 32, 96), torch.float32), x.mT)
    assert (gram - torch.eye(32)).abs().max() < 0.6
    assert (gram - torch.diag_embed(gram.diagonal(dim1=1, dim2=2))).abs().max() < 0.3


def test_matrices_of_zeros_stay_zero():
    assert not newton_schulz(torch.zeros(2, 3, 4), torch.float32).any()


def test_a_matrix_moves_as_by_torchs_muon():
    """Which computes in bfloat16; step after step, for both scales."""
    torch.manual_seed(0)
    for adjust in ("match_rms_adamw", "original"):
        for shape in ((32, 96), (96, 32)):
            start = torch.randn(shape) * 0.1
            theirs, mine = (torch.nn.Parameter(start.clone()) for _ in range(2))
            peer = Muon([theirs], lr=0.02, weight_decay=0.1, momentum=0.9, adjust_lr_fn=adjust)
            optim = config.Optim(name="muon", lr=0.02, momentum=0.9, muon_adjust_lr=adjust)
            group = {"params": [mine], "algorithm": "muon", "weight_decay": 0.1}
            ours = MuonAdamW([group], optim, torch.bfloat16)
            ours.state[mine] = {"exp_avg": torch.zeros(shape)}
            rows, columns = shape
            scale = 0.2 * math.sqrt(max(shape)) if adjust == "match_rms_adamw" else math.sqrt(max(1, rows / columns))
            ours.lay_out(mine, [Whole(0, 1, Matrices(rows, columns, 1, scale))])
            for _ in range(5):
                gradient = torch.randn(shape)
                theirs.grad, mine.grad = gradient.clone(), gradient.clone()
                peer.step()
                ours.step()
                assert mine.grad is None  # AdamW must not see it
            moved = (theirs - start).abs().max()
            assert (theirs - mine).abs().max() < 0.05 * moved, (adjust, shape)


def moved(model: config.Model, optim: config.Optim, steps: int = 3) -> tuple[MobileMoE, dict[str, Tensor], list]:
    """A model after some steps with random gradients; where it began; those gradients by name."""
    network = MobileMoE(model)
    network.init_weights(0)
    engine = PlainEngine(network, optim)
    start = {name: p.detach().clone() for name, p in network.named_parameters()}
    given = []
    for _ in range(steps):
        given.append({name: torch.randn_like(p) for name, p in network.named_parameters()})
        for name, p in network.named_parameters():
            p.grad = given[-1][name].clone()
        engine.step(optim.lr)
    return network, start, given


@pytest.mark.parametrize("adjust", ["match_rms_adamw", "original"])
def test_a_network_moves_as_by_a_slow_reference(small_model, adjust):
    """Every expert's gate, up and down projection by itself, in float64; what is not Muon's as AdamW alone moves it."""
    optim = config.Optim(name="muon", lr=0.01, weight_decay=0.1, muon_adjust_lr=adjust, muon_lr_ratio=2.0)
    torch.manual_seed(0)
    network, start, given = moved(small_model, optim)
    torch.manual_seed(0)
    adamw, _, _ = moved(small_model, config.Optim(lr=0.01, weight_decay=0.1))
    by_adamw = dict(adamw.named_parameters())
    rate = optim.lr * optim.muon_lr_ratio
    entries = {entry.name: entry for entry in tensors(small_model)}
    for name, parameter in network.named_parameters():
        part = entries[name].part
        if part not in MUON_PARTS:
            assert torch.equal(parameter, by_adamw[name]), name
            continue
        weight, mean = start[name].double(), torch.zeros_like(start[name]).double()
        for gradients in given:
            gradient = gradients[name].double()
            mean = optim.momentum * mean + (1 - optim.momentum) * gradient
            ahead = optim.momentum * mean + (1 - optim.momentum) * gradient
            weight = weight * (1 - rate * optim.weight_decay)
            stack = ahead if ahead.ndim == 3 else ahead[None]
            updates = []
            for matrix in stack:
                halves = matrix.chunk(2, dim=1) if "gate_up" in name else [matrix]
                fan_in, fan_out = halves[0].shape if part == "routed experts" else halves[0].shape[::-1]
                scale = (
                    0.2 * max(fan_in, fan_out) ** 0.5
                    if adjust == "match_rms_adamw"
                    else max(1, fan_out / fan_in) ** 0.5
                )
                updates.append(torch.cat([scale * slow_newton_schulz(half) for half in halves], dim=1))
            weight = weight - rate * torch.stack(updates).view_as(weight)
        assert (parameter - weight).abs().max() < 1e-5 * rate / 0.01, name


def test_steps_are_as_large_as_adamws(small_model):
    """Root mean square of a step with random gradients, over AdamW's, for every matrix."""
    sizes = {}
    for name in ("muon", "adamw"):
        torch.manual_seed(1)
        network, start, _ = moved(small_model, config.Optim(name=name, lr=1e-3, weight_decay=0.0), steps=20)
        moves = {n: p.detach() - start[n] for n, p in network.named_parameters()}
        sizes[name] = {n: float(move.square().mean().sqrt()) for n, move in moves.items()}
    for entry in tensors(small_model):
        if entry.part in MUON_PARTS:
            assert 0.3 < sizes["muon"][entry.name] / sizes["adamw"][entry.name] < 2, entry.name


def test_large_stacks_are_worked_off_piece_by_piece(small_model, monkeypatch):
    torch.manual_seed(2)
    whole, _, _ = moved(small_model, config.Optim(name="muon", lr=0.01))
    assert CHUNK > 8 * 64 * 64
    monkeypatch.setattr("mm_train.muon.CHUNK", 3 * 64 * 64)
    torch.manual_seed(2)
    pieces, _, _ = moved(small_model, config.Optim(name="muon", lr=0.01))
    for (name, a), b in zip(whole.named_parameters(), pieces.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0, msg=name)


def test_groups_of_a_muon_run(small_model):
    groups = parameter_groups(MobileMoE(small_model), config.Optim(name="muon", no_decay=["norms", "embedding"]))
    found = {group["name"]: sum(p.numel() for p in group["params"]) for group in groups}
    embedding, router = 512 * 64, 2 * 8 * 64
    norms = 64 * (2 * 2 + 1)
    assert found["adamw, weight decay 0"] == embedding + norms
    assert found["adamw, weight decay 0.1"] == router
    matrices = [matrices_of(entry, ALONE, config.Optim()) for entry in tensors(small_model) if entry.part in MUON_PARTS]
    assert len(matrices) == 2 * 9
    assert [m.blocks for m in matrices].count(2) == 2
