"""What test_parity.py runs on several ranks: argv is a JSON file with the cells to try (see Cell) and where to report.

Each cell is one layout of the real Trainer. It trains some steps from the initial weights, saves a checkpoint, and
goes on, from there or from a checkpoint that another layout wrote. What it meets goes into a report, to be compared
with what one plain process meets in the same steps.
"""

import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_train import config
from mm_train.anomalies import Anomalies
from mm_train.checkpoint.reader import Reader
from mm_train.data import Loader
from mm_train.metrics import Metrics
from mm_train.model import MobileMoE
from mm_train.muon import MuonAdamW
from mm_train.parallel.assemble import assemble
from mm_train.parallel.engine import build_engine
from mm_train.parallel.groups import Groups, form_groups, init_groups
from mm_train.sharding import local_boxes
from mm_train.trainer import Trainer
from mm_train.watchdog import Watchdog
from mm_train.weights import fill, initial

STEPS, HALF = 6, 3  # of a run, and when it is saved
LONG = 10  # steps of the schedule, and of the longest run


@dataclass
class Cell:
    name: str
    dispatch: str
    expert_parallel: int = 1
    zero_stage: int = 0
    tensor_parallel: int = 1
    recompute: str = "none"
    dtype: str = "float32"
    steps: int = STEPS
    resume_from: str = ""  # checkpoint folder that another layout wrote
    engine: str = "deepspeed"

    def configure(self, cfg: config.Config, folder: Path) -> config.Config:
        return dataclasses.replace(
            cfg,
            parallel=config.Parallel(self.engine, self.expert_parallel, self.tensor_parallel, self.zero_stage),
            moe=dataclasses.replace(cfg.moe, dispatch=self.dispatch),
            train=dataclasses.replace(cfg.train, recompute=self.recompute, dtype=self.dtype),
            run=config.Run(dir=str(folder / self.name)),
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    spec = json.loads(Path(sys.argv[1]).read_text())
    folder, base = Path(spec["folder"]), config.load([spec["config"]])
    groups, layout = None, None
    report = {}
    for cell in (Cell(**cell) for cell in spec["cells"]):
        cfg = cell.configure(base, folder)
        groups = init_groups(cfg.parallel) if groups is None else reform(cfg.parallel, layout, groups)
        layout = cfg.parallel
        report[cell.name] = try_cell(cell, cfg, groups, folder)
    assert groups is not None
    if groups.is_main:
        Path(spec["report"]).write_text(json.dumps(report))
    groups.close()


def reform(parallel: config.Parallel, before: config.Parallel | None, groups: Groups) -> Groups:
    """The groups of another layout in the same world."""
    if parallel == before:
        return groups
    from deepspeed.utils import groups as deepspeed_groups

    deepspeed_groups.mpu = None
    if groups.mpu is not None:
        groups.mpu.destroy_model_parallel()
    for known in (
        deepspeed_groups._EXPERT_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP,
        deepspeed_groups._EXPERT_PARALLEL_GROUP_RANKS,
        deepspeed_groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        known.clear()
    return form_groups(parallel, groups.rank, groups.world, groups.device)


def new_trainer(cfg: config.Config, groups: Groups, seed: int) -> Trainer:
    """A run at its beginning that tells nobody."""
    model = assemble(cfg, groups)
    fill(model, cfg.model, initial(cfg.model, seed), groups.place)
    metrics = Metrics(cfg.run.dir, is_main=False, wandb_mode="disabled", config={}, project="", run_name="")
    loader = Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
    watchdog = Watchdog(cfg.run.dir, groups.rank, groups.world, seconds=0)
    return Trainer(cfg, groups, build_engine(model, cfg, groups), loader, metrics, watchdog)


def try_cell(cell: Cell, cfg: config.Config, groups: Groups, folder: Path) -> dict[str, Any]:
    trainer = new_trainer(cfg, groups, cfg.train.seed)
    report: dict[str, Any] = {"gradients": gradient_errors(trainer, load_file(folder / f"{cell.dispatch}-gradients"))}
    skip_a_step(trainer)
    report["steps"] = [one_step(trainer) for _ in range(HALF)]
    trainer.save()
    trainer.finish_writing()
    groups.gather(None)  # rank 0 publishes

    again = new_trainer(cfg, groups, seed=99)
    again.resume(Reader(Path(cfg.run.dir) / "checkpoints" / f"step-{HALF:08d}"))
    here, there = one_step(trainer), one_step(again)
    same = here == there and all(torch.equal(*pair) for pair in zip(values(trainer), values(again), strict=True))
    report["resumed"] = all(groups.gather(same))  # bit for bit

    if cell.resume_from:
        trainer = again
        trainer.resume(Reader(Path(cell.resume_from)))
    else:
        report["steps"].append(here)
    while trainer.step < cell.steps:
        report["steps"].append(one_step(trainer))
    adam = trainer.engine.adam
    if isinstance(adam, MuonAdamW):  # matrices of which ranks hold parts
        report["cut"] = sum(groups.gather(sum(len(cut) for _, cut in adam._layout.values())))
    report["weights"] = weight_errors(trainer, load_file(folder / f"{cell.dispatch}-{cell.dtype}-{cell.steps}"))
    return report


def one_step(trainer: Trainer) -> dict[str, Any]:
    """A training step, and all that is said of it but the time it took."""
    outcome = trainer.train_step(stop=False)
    told = trainer.values(outcome)
    trainer.interval.start()
    keys = (
        "grad_norm",
        "grad_norm_parts",
        "z_loss",
        "router_entropy",
        "dropped_fraction",
        "expert_load",
        "data_mixture",
    )
    return {"loss": outcome.totals.loss, "action": outcome.verdict.action, **{key: told[key] for key in keys}}


def values(trainer: Trainer) -> list[Tensor]:
    """Parameters and buffers on this rank."""
    model = trainer.engine.model
    return [*model.parameters(), *model.buffers()]


def skip_a_step(trainer: Trainer) -> None:
    """A step whose gradients are not finite: nothing of it may be left."""
    weight = trainer.cfg.moe.z_loss_weight
    trainer.cfg.moe.z_loss_weight = float("nan")
    assert trainer.train_step(stop=False).verdict.action == "skip"
    trainer.cfg.moe.z_loss_weight = weight
    trainer.step, trainer.anomalies = 0, Anomalies(trainer.cfg.faults)
    trainer.interval.start()


def gradient_errors(trainer: Trainer, whole: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each named gradient of the first step over the ranks, relative to its largest element."""
    engine, groups = trainer.engine, trainer.groups
    trainer._accumulate(stop=False)
    boxes = {entry.name: box for entry, box in local_boxes(trainer.cfg.model, groups.place)}
    errors = {}
    for fragment in engine.fragments():
        expected = whole[fragment.name][boxes[fragment.name].slices].reshape(-1)[fragment.start : fragment.stop]
        error = (engine.gradient(fragment) - expected).abs().max() / whole[fragment.name].abs().max()
        errors[fragment.name] = float(error)
    engine.discard()
    trainer.interval.forget_step()
    return largest(groups, errors)


def weight_errors(trainer: Trainer, whole: dict[str, Tensor]) -> dict[str, float]:
    """Largest difference of each parameter and buffer over the ranks."""
    model: MobileMoE = trainer.engine.model
    mine = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    boxes = local_boxes(trainer.cfg.model, trainer.groups.place)
    return largest(
        trainer.groups, {e.name: float((mine[e.name] - whole[e.name][box.slices]).abs().max()) for e, box in boxes}
    )


def largest(groups: Groups, errors: dict[str, float]) -> dict[str, float]:
    """The largest of every rank's errors by name."""
    merged: dict[str, float] = {}
    for each in groups.gather(errors):
        for name, error in each.items():
            merged[name] = max(error, merged.get(name, 0.0))
    return merged


if __name__ == "__main__":
    main()
