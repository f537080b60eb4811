"""What test_parity.py runs on several ranks: argv is a JSON file with the cells to try (see Cell) and where to report.

Each cell is one layout. It trains some steps from the initial weights, saves a checkpoint, and goes on from one that
another layout wrote; losses, gradients and parameters are compared with those of one plain process.
"""

import dataclasses
import json
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from mm_train import config
from mm_train.checkpoint.reader import Reader, restore
from mm_train.checkpoint.writer import Writer
from mm_train.data import Loader
from mm_train.engine import Engine
from mm_train.model import MobileMoE
from mm_train.optim import clip, gradient_norms, learning_rate, update_expert_bias
from mm_train.parallel.assemble import assemble
from mm_train.parallel.engine import build_engine
from mm_train.parallel.groups import Groups, form_groups, init_groups
from mm_train.sharding import local_boxes
from mm_train.weights import fill, initial

STEPS, HALF = 6, 3  # of a run, and when it is saved
SCHEDULE = 10  # steps over which the learning rate falls: the longest run here


@dataclass
class Cell:
    name: str
    dispatch: str
    expert_parallel: int
    zero_stage: int
    tensor_parallel: int = 1
    recompute: str = "none"
    steps: int = STEPS
    resume_from: str = ""  # checkpoint folder that another layout wrote

    def configure(self, cfg: config.Config) -> config.Config:
        layout = config.Parallel("deepspeed", self.expert_parallel, self.tensor_parallel, self.zero_stage)
        return dataclasses.replace(
            cfg,
            parallel=layout,
            moe=dataclasses.replace(cfg.moe, dispatch=self.dispatch),
            train=dataclasses.replace(cfg.train, recompute=self.recompute),
        )


def main() -> None:
    warnings.filterwarnings("ignore")
    spec = json.loads(Path(sys.argv[1]).read_text())
    base = config.load([spec["config"]])
    cells = [Cell(**cell) for cell in spec["cells"]]
    first = cells[0].configure(base)
    groups = init_groups(first.parallel)
    report = {}
    for cell in cells:
        cfg = cell.configure(base)
        groups = groups if cfg.parallel == first.parallel else reform(cfg.parallel, groups)
        first = cfg
        report[cell.name] = try_cell(cell, cfg, groups, Path(spec["folder"]))
    if groups.is_main:
        Path(spec["report"]).write_text(json.dumps(report))
    groups.close()


def reform(parallel: config.Parallel, groups: Groups) -> Groups:
    """Other groups in the same world."""
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


def try_cell(cell: Cell, cfg: config.Config, groups: Groups, folder: Path) -> dict:
    loader = Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
    want = json.loads((folder / f"{cell.dispatch}.json").read_text())
    model = assemble(cfg, groups)
    fill(model, cfg.model, initial(cfg.model, cfg.train.seed), groups.place)
    engine = build_engine(model, cfg, groups)
    report: dict = {"losses": [], "norms": [], "gradients": {}, "dropped": 0}

    spoil(engine, loader, cfg, groups)
    for step in range(min(HALF, cell.steps)):
        loss, dropped = accumulate(engine, loader, step, cfg, groups)
        if step == 0:
            report["gradients"] = gradient_errors(engine, cfg, groups, load_file(folder / f"{cell.dispatch}-gradients"))
        report["losses"].append((loss, want["losses"][step]))
        report["norms"].append((apply(engine, step, cfg, groups), want["norms"][step]))
        report["dropped"] += dropped
    run_dir = folder / cell.name
    writer = Writer(run_dir, groups, cfg)
    writer.save(HALF, engine, {"samples": 0, "rows_per_step": 1, "data": {}, "skipped_steps": 0, "rollbacks": 0})
    writer.wait()
    groups.barrier()
    report["resumed"] = resumes_exactly(cell, cfg, engine, loader, groups, run_dir)

    if cell.resume_from:
        del engine, model
        engine = fresh_engine(cfg, groups, Path(cell.resume_from))
    for step in range(HALF, cell.steps) if cell.resume_from else ():
        loss, _ = accumulate(engine, loader, step, cfg, groups)
        report["losses"].append((loss, want["losses"][step]))
        report["norms"].append((apply(engine, step, cfg, groups), want["norms"][step]))
    if cell.resume_from:
        whole = load_file(folder / f"{cell.dispatch}-weights-{cell.steps}")
        errors = {}
        for name, ours, expected in local_pairs(engine.model, cfg, groups, whole):
            errors[name] = float((ours - expected).abs().max())
        report["weights"] = max(max(each.values()) for each in groups.gather(errors))
        report["num_weights"] = len(errors)
    return report


def spoil(engine: Engine, loader: Loader, cfg: config.Config, groups: Groups) -> None:
    """A step that is thrown away for its gradients: nothing of it may be left."""
    accumulate(engine, loader, 0, cfg, groups, factor=float("nan"))
    norms = gradient_norms(engine, groups)
    assert norms["total"] != norms["total"], norms
    engine.discard()


def resumes_exactly(
    cell: Cell, cfg: config.Config, engine: Engine, loader: Loader, groups: Groups, run_dir: Path
) -> bool:
    """Load the checkpoint just written into a fresh engine of the same layout: is the next step equal bit for bit?"""
    fresh = fresh_engine(cfg, groups, run_dir / "checkpoints" / f"step-{HALF:08d}")
    outcomes = []
    for each in (engine, fresh):
        loss, _ = accumulate(each, loader, HALF, cfg, groups)
        norm = apply(each, HALF, cfg, groups)
        outcomes.append((loss, norm, dict(each.model.named_parameters())))
    (loss, norm, weights), (fresh_loss, fresh_norm, fresh_weights) = outcomes
    same = all(torch.equal(weights[name], fresh_weights[name]) for name in weights)
    return all(groups.gather(same and loss == fresh_loss and norm == fresh_norm))


def fresh_engine(cfg: config.Config, groups: Groups, folder: Path) -> Engine:
    """Another engine, its weights and moments from a checkpoint."""
    model = assemble(cfg, groups)
    fill(model, cfg.model, initial(cfg.model, seed=99), groups.place)
    engine = build_engine(model, cfg, groups)
    restore(Reader(folder), engine, groups)
    return engine


def gradient_errors(engine: Engine, cfg: config.Config, groups: Groups, whole: dict[str, Tensor]) -> dict[str, float]:
    """Largest error of each named gradient over the ranks, relative to its largest element."""
    boxes = {entry.name: box for entry, box in local_boxes(cfg.model, groups.place)}
    errors = {}
    for fragment in engine.fragments():
        expected = whole[fragment.name][boxes[fragment.name].slices].reshape(-1)[fragment.start : fragment.stop]
        error = (engine.gradient(fragment) - expected).abs().max() / whole[fragment.name].abs().max()
        errors[fragment.name] = float(error)
    merged: dict[str, float] = {}
    for each in groups.gather(errors):
        for name, error in each.items():
            merged[name] = max(error, merged.get(name, 0.0))
    return merged


def local_pairs(model: MobileMoE, cfg: config.Config, groups: Groups, whole: dict[str, Tensor]):
    """(name, tensor here, the same part of `whole`) of all parameters."""
    parameters = dict(model.named_parameters())
    for entry, box in local_boxes(cfg.model, groups.place):
        if entry.name in parameters:
            yield entry.name, parameters[entry.name].detach(), whole[entry.name][box.slices]


def accumulate(
    engine: Engine, loader: Loader, step: int, cfg: config.Config, groups: Groups, factor: float = 1.0
) -> tuple[float, int]:
    """Forward and backward of one global batch, and the bias update; returns its mean loss and dropped slots."""
    rows = cfg.train.global_batch_tokens // cfg.data.seq_len
    share = (rows, cfg.train.micro_batch_size, groups.dp_rank, groups.dp_size)
    batches = list(loader.micro_batches(step * rows, *share))
    scored = groups.sum(torch.tensor(float(sum(b.num_scored for b in batches))))
    sums, counts = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        losses = engine.forward(batch)
        z_loss = losses.z_loss_sum / cfg.train.global_batch_tokens
        loss = losses.cross_entropy_sum / scored + cfg.moe.z_loss_weight * z_loss
        engine.backward(loss * engine.loss_scale * factor)
        sums += torch.stack([losses.cross_entropy_sum.detach(), losses.dropped_L.sum()]).double()
        counts = counts + losses.counts_LE
    if factor == 1.0:
        biases = [layer.expert_bias for layer in engine.model.moe_layers()]
        update_expert_bias(biases, groups.sum(counts), cfg.moe.bias_update_rate)
    nats, dropped = groups.sum(sums).tolist()
    return nats / float(scored), int(dropped)


def apply(engine: Engine, step: int, cfg: config.Config, groups: Groups) -> float:
    """Clip and update; returns the norm of the gradient before."""
    norm = gradient_norms(engine, groups)["total"]
    clip(engine, norm, cfg.optim.clip_grad_norm)
    engine.step(learning_rate(step, SCHEDULE, cfg.optim))
    return norm


if __name__ == "__main__":
    main()
