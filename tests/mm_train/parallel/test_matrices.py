"""Muon where matrices are cut, by ZeRO and by tensor parallelism, against one plain process."""

import dataclasses
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mm_train import config
from mm_train.checkpoint.reader import Reader, restore
from mm_train.engine import PlainEngine
from mm_train.inventory import KINDS, tensors
from mm_train.model import MobileMoE
from mm_train.muon import Matrices, pieces
from mm_train.optim_groups import MUON_PARTS
from mm_train.parallel.groups import Groups
from mm_train.parallel.matrices import owners_of
from tests.mm_train.parallel.test_parity import (
    SAVED,
    assert_same_steps,
    assert_same_tensors,
    reference,
    run_cells,
    train_alone,
)
from tests.mm_train.parallel.worker import LONG, STEPS

CELLS = {  # in this order; each but the first goes on from the checkpoint of the one before it
    "ep1-zero1": {"zero_stage": 1},
    "ep2-zero1": {"zero_stage": 1, "expert_parallel": 2},
    "tp2-ep2-zero1": {"zero_stage": 1, "expert_parallel": 2, "tensor_parallel": 2},
    "ep4-zero2": {"zero_stage": 2, "expert_parallel": 4},
    "tp2-zero0": {"zero_stage": 0, "tensor_parallel": 2},
}


@pytest.fixture(scope="module")
def cfg(small_model, data_set) -> config.Config:
    # Widths at which parts of parameter groups end inside of matrices.
    model = dataclasses.replace(small_model, intermediate_size_mlp=96, num_hidden_layers=3)
    cfg = config.Config(model=model)
    cfg.data = config.Data(path=str(data_set), mixture={"code": 3, "chat": 1}, seq_len=64)
    cfg.train = config.Train(tokens=LONG * 1024, global_batch_tokens=1024, micro_batch_size=2)
    cfg.optim = config.Optim(name="muon", lr=1e-3, warmup_steps=2, eps=1e-6)
    cfg.run.dir = "unused"
    return cfg


@pytest.fixture(scope="module")
def folder(cfg, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("muon")
    train_alone(cfg, folder, [("dropless", "float32")])
    return folder


@pytest.fixture(scope="module")
def reports(folder, python) -> dict:
    cells, before = [], ""
    for name, values in CELLS.items():
        cells.append({"name": name, "dispatch": "dropless", "resume_from": before, **values})
        before = str(folder / name / SAVED)
    return run_cells(python, folder, 4, "muon", cells)


@pytest.mark.parametrize("name", CELLS)
def test_a_layout_trains_as_one_process_does(reports, folder, cfg, name):
    assert_same_steps(reports[name], reference(folder, "dropless"), STEPS)
    assert_same_tensors(reports[name], cfg.model)
    assert reports[name]["resumed"]  # bit for bit, in the same layout


def test_matrices_were_cut(reports):
    assert all(reports[name]["cut"] >= 2 for name in ("ep1-zero1", "ep2-zero1", "tp2-ep2-zero1"))
    assert reports["tp2-zero0"]["cut"] == 0


def test_a_checkpoint_has_no_second_moment_of_muons_matrices_and_loads_on_one_process(reports, folder, cfg):
    reader = Reader(folder / "tp2-ep2-zero1" / SAVED)
    kept = {entry.name: reader.kinds_of[entry.name] for entry in tensors(cfg.model) if entry.part in MUON_PARTS}
    assert set(kept.values()) == {("weight", "exp_avg")}
    assert reader.kinds_of["model.embed_tokens.weight"] == KINDS
    engine = PlainEngine(MobileMoE(cfg.model), cfg.optim)
    restore(reader, engine, Groups())
    for name in kept:
        parameter = engine.parameters[name]
        assert torch.equal(parameter, reader.read(name)), name
        assert torch.equal(engine.adam.state[parameter]["exp_avg"], reader.read(name, "exp_avg")), name
        assert reader.read(name, "exp_avg").any()


@given(
    rows=st.integers(1, 4),
    columns=st.integers(1, 5),
    number=st.integers(1, 5),
    part=st.integers(1, 60),
    lead=st.integers(0, 9),
)
def test_parts_of_a_vector_and_their_owners_make_up_every_matrix_once(rows, columns, number, part, lead):
    """A tensor behind `lead` other elements in a vector of which each rank has `part` elements."""
    matrices, total = Matrices(rows, columns), rows * columns * number
    ranges = []
    for begin in range(0, lead + total, part):
        start, stop = (min(max(end - lead, 0), total) for end in (begin, begin + part))
        ranges.append((start, stop))
    seen: list[int] = []
    for rank, (start, stop) in enumerate(ranges):
        offset = max(0, lead - rank * part)
        whole, cut = pieces(matrices, offset, start, stop)
        assert len(cut) <= 2
        for piece in whole:
            first = start + piece.offset - offset
            assert first % matrices.size == 0
            seen += range(first, first + piece.number * matrices.size)
        for piece in cut:
            first = piece.which * matrices.size + piece.first
            assert first == start + piece.offset - offset
            seen += range(first, first + piece.length)
            owners = owners_of(piece.which, matrices.size, ranges)
            assert len(owners) > 1
            assert (rank, piece.first, piece.length) in owners
    assert sorted(seen) == list(range(total))
