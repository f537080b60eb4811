"""Every layout against one plain process: losses, gradients, parameters, and checkpoints handed from layout to layout.

One launch for each number of processes; worker.py is what runs there.
"""

import json
import os
import subprocess
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mm_train import config
from mm_train.checkpoint.reader import Reader, restore
from mm_train.data import Loader
from mm_train.engine import KINDS, PlainEngine
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from tests.mm_train.parallel import worker

ROOT = Path(__file__).parents[3]
DISPATCHES = ("dropless", "drop_and_pad")
LAYOUTS = {world: [(ep, zero) for ep in (1, 2, 4) if ep <= world for zero in (0, 1, 2)] for world in (4, 2, 1)}
CELLS = [(w, ep, zero, dispatch) for w, layouts in LAYOUTS.items() for ep, zero in layouts for dispatch in DISPATCHES]


def launch(python: str, ranks: int, spec: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*command, str(ROOT / "tests/mm_train/parallel/worker.py"), str(spec)],
        cwd=ROOT, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]


def name_of(world: int, ep: int, zero: int, dispatch: str) -> str:
    return f"{world}x-ep{ep}-zero{zero}-{dispatch}"


@pytest.fixture(scope="module")
def cfg(small_model, data_set) -> config.Config:
    cfg = config.Config(model=small_model)
    cfg.data = config.Data(path=str(data_set), mixture={"code": 3, "chat": 1}, seq_len=64)
    cfg.train = config.Train(tokens=worker.STEPS * 1024, global_batch_tokens=1024, micro_batch_size=2)
    # Adam divides by the root of a mean of squares: with the usual epsilon, elements whose gradient is all rounding
    # would be moved by the full learning rate, in a direction that rounding decides.
    cfg.optim = config.Optim(lr=1e-3, warmup_steps=2, eps=1e-6)
    cfg.moe = config.Moe(capacity_factor=1.25)
    cfg.run.dir = "unused"
    return cfg


@pytest.fixture(scope="module")
def reference(cfg, tmp_path_factory) -> Path:
    """Folder with what one plain process makes of the same steps, for each dispatch."""
    folder = tmp_path_factory.mktemp("parity")
    config.save(cfg, folder / "config.yaml")
    for dispatch in DISPATCHES:
        cell = worker.Cell(dispatch, dispatch, 1, 0).configure(cfg)
        model = MobileMoE(cfg.model)
        model.init_weights(cfg.train.seed)
        for layer in model.moe_layers():
            layer.dispatcher.capacity_factor = cfg.moe.capacity_factor if dispatch == "drop_and_pad" else None
        engine = PlainEngine(model.train(), cfg.optim)
        loader = Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
        facts: dict = {"losses": [], "norms": [], "dropped": 0}
        for step in range(worker.SCHEDULE):
            loss, dropped = worker.accumulate(engine, loader, step, cell, Groups())
            if step == 0:
                gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
                save_file(gradients, folder / f"{dispatch}-gradients")
            facts["losses"].append(loss)
            facts["norms"].append(worker.apply(engine, step, cell, Groups()))
            facts["dropped"] += dropped
            if step + 1 in (worker.STEPS, worker.SCHEDULE):
                weights = {name: p.detach().clone() for name, p in model.named_parameters()}
                save_file(weights, folder / f"{dispatch}-weights-{step + 1}")
        (folder / f"{dispatch}.json").write_text(json.dumps(facts))
    return folder


@pytest.fixture(scope="module")
def reports(reference, python) -> dict:
    """Reports of all cells. Each goes on from the checkpoint that the cell before it wrote, in another layout."""
    found: dict = {}
    before = dict.fromkeys(DISPATCHES, "")
    for world, layouts in LAYOUTS.items():
        cells = []
        for (ep, zero), dispatch in product(layouts, DISPATCHES):
            name = name_of(world, ep, zero, dispatch)
            cells.append({"name": name, "dispatch": dispatch, "expert_parallel": ep, "zero_stage": zero})
            cells[-1]["resume_from"] = before[dispatch] or str(reference / name / "checkpoints/step-00000003")
            before[dispatch] = str(reference / name / "checkpoints/step-00000003")
        spec = reference / f"{world}.json"
        files = {"config": str(reference / "config.yaml"), "report": str(reference / f"report-{world}.json")}
        spec.write_text(json.dumps({"cells": cells, "folder": str(reference), **files}))
        launch(python, world, spec)
        found |= json.loads(Path(files["report"]).read_text())
    return found


@pytest.mark.parametrize(("world", "ep", "zero", "dispatch"), CELLS)
def test_a_layout_trains_as_one_process_does(reports, small_model, world, ep, zero, dispatch):
    report = reports[name_of(world, ep, zero, dispatch)]
    assert len(report["losses"]) == worker.STEPS
    assert max(abs(ours - want) for ours, want in report["losses"]) <= 1e-5
    assert max(abs(ours - want) / want for ours, want in report["norms"]) <= 1e-5
    assert len(report["gradients"]) == report["num_weights"] == 2 + 12 * small_model.num_hidden_layers
    assert max(report["gradients"].values()) < 5e-6, max(report["gradients"], key=report["gradients"].get)
    assert report["weights"] <= 1e-5
    assert (report["dropped"] > 0) == (dispatch == "drop_and_pad")
    assert report["resumed"]  # bit for bit, in the same layout


def test_the_comparison_means_something(reports, reference):
    losses = json.loads((reference / "dropless.json").read_text())["losses"]
    assert losses[-1] < losses[0] - 0.1
    moved = torch.tensor([want for _, want in reports[name_of(1, 1, 0, "dropless")]["losses"]])
    assert moved.diff().abs().min() > 1e-3


# --- tensor parallel, and recomputed activations ----------------------------------------------------------------------

MORE = {
    "tp2-ep2-zero1-dropless": {"dispatch": "dropless", "expert_parallel": 2, "tensor_parallel": 2, "zero_stage": 1},
    "tp2-ep2-zero0-drop": {"dispatch": "drop_and_pad", "expert_parallel": 2, "tensor_parallel": 2, "zero_stage": 0},
    "tp2-zero2-recomputed": {
        "dispatch": "dropless",
        "expert_parallel": 1,
        "tensor_parallel": 2,
        "zero_stage": 2,
        "recompute": "layer",
    },
    "ep4-zero1-recomputed": {"dispatch": "drop_and_pad", "expert_parallel": 4, "zero_stage": 1, "recompute": "layer"},
}


@pytest.fixture(scope="module")
def more(reference, reports, python) -> dict:
    """Reports of the cells in MORE, on four ranks; they go on from what one process wrote."""
    cells = []
    for name, cell in MORE.items():
        start = reference / name_of(1, 1, 0, cell["dispatch"]) / "checkpoints/step-00000003"
        cells.append({"name": name, "steps": worker.SCHEDULE, "resume_from": str(start), **cell})
    spec, report = reference / "more.json", reference / "report-more.json"
    files = {"config": str(reference / "config.yaml"), "report": str(report), "folder": str(reference)}
    spec.write_text(json.dumps({"cells": cells, **files}))
    launch(python, 4, spec)
    return json.loads(report.read_text())


@pytest.mark.parametrize("name", MORE)
def test_tensor_parallel_and_recomputed_layouts_train_as_one_process_does(more, small_model, name):
    report = more[name]
    assert len(report["losses"]) == worker.SCHEDULE
    assert max(abs(ours - want) / want for ours, want in report["losses"]) <= 1e-5
    assert max(abs(ours - want) / want for ours, want in report["norms"]) <= 1e-4
    assert len(report["gradients"]) == 2 + 12 * small_model.num_hidden_layers
    assert max(report["gradients"].values()) < 5e-6, max(report["gradients"], key=report["gradients"].get)
    assert report["weights"] <= 1e-5
    assert (report["dropped"] > 0) == (MORE[name]["dispatch"] == "drop_and_pad")
    assert report["resumed"]


def test_a_tensor_parallel_checkpoint_loads_on_one_process(more, reference, cfg):
    """Every tensor of it is, to rounding, what one process saved at the same step."""
    tp, alone = (
        Reader(reference / name / "checkpoints/step-00000003")
        for name in ("tp2-ep2-zero1-dropless", name_of(1, 1, 0, "dropless"))
    )
    for name in alone.names():
        for kind in KINDS if name.endswith(("weight", "proj")) else ("weight",):
            assert (tp.read(name, kind) - alone.read(name, kind)).abs().max() <= 1e-5, (kind, name)
    model = MobileMoE(cfg.model)
    engine = PlainEngine(model, cfg.optim)
    restore(tp, engine, Groups())
    assert torch.equal(model.model.embed_tokens.weight, tp.read("model.embed_tokens.weight"))
