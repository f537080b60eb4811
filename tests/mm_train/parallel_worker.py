"""What test_parallel.py runs on several ranks: argv is a saved config, the file for rank 0's report, and dispatches."""

import dataclasses
import json
import sys
from pathlib import Path

import torch

from mm_train import checkpoint, config
from mm_train.checkpoint import is_expert
from mm_train.data import Loader
from mm_train.engine import Engine, PlainEngine
from mm_train.model import MobileMoE
from mm_train.optim import learning_rate, update_expert_bias
from mm_train.parallel import DeepSpeedEngine, Groups, init_groups, shard_experts


def main() -> None:
    cfg = config.load([sys.argv[1]])
    groups = init_groups(cfg.parallel)
    report = {}
    for dispatch in sys.argv[3:]:
        cfg = dataclasses.replace(cfg, moe=dataclasses.replace(cfg.moe, dispatch=dispatch))
        report[dispatch] = compare(cfg, groups)
    if groups.is_main:
        Path(sys.argv[2]).write_text(json.dumps(report))
    groups.close()


def compare(cfg: config.Config, groups: Groups) -> dict:
    """The same steps on one process in plain PyTorch and on all ranks with DeepSpeed and sharded experts."""
    loader = Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
    single = PlainEngine(build(cfg), cfg.optim)
    sharded_model = build(cfg)
    shard_experts(sharded_model, groups)
    sharded = DeepSpeedEngine(sharded_model, cfg, groups)
    mine = groups.local_experts(cfg.model.num_local_experts)
    whole = dict(single.model.named_parameters())

    losses, gradients, dropped = [], {}, 0.0
    for step in range(cfg.total_steps):
        want, _ = run_step(single, loader, step, cfg, Groups())
        got, step_dropped = run_step(sharded, loader, step, cfg, groups)
        dropped += step_dropped
        losses.append((want, got))
        if step == 0:
            from deepspeed.utils import safe_get_full_grad

            for name, parameter in sharded_model.named_parameters():
                expected = whole[name].grad[mine.start : mine.stop] if is_expert(name) else whole[name].grad
                error = (safe_get_full_grad(parameter) - expected).abs().max() / expected.abs().max()
                gradients[name] = float(error)
        rate = learning_rate(step, cfg.total_steps, cfg.optim)
        norms = float(single.step(rate)), float(sharded.step(rate))
        assert abs(norms[0] - norms[1]) < 1e-5 * norms[0], norms
    weights = max(
        float((p.data - (whole[n].data[mine.start : mine.stop] if is_expert(n) else whole[n].data)).abs().max())
        for n, p in sharded_model.named_parameters()
    )
    run_dir = Path(cfg.run.dir) / cfg.moe.dispatch
    checkpoint.save(run_dir, cfg.total_steps, sharded, groups, cfg, {"samples": 0, "data_fingerprint": ""})
    return {
        "losses": losses,
        "gradients": gradients,
        "weights": weights,
        "dropped": dropped,
        "resharded": reload_elsewhere(run_dir, cfg, single) if groups.is_main else 0.0,
        "resumed": resume_in_place(run_dir, cfg, sharded, loader, groups),
    }


def resume_in_place(run_dir: Path, cfg: config.Config, engine: DeepSpeedEngine, loader: Loader, groups: Groups) -> bool:
    """Load the checkpoint into fresh engines on the same ranks: does the next step equal, bit for bit, that of the
    engine that wrote it?"""
    model = build(dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, seed=1)))
    shard_experts(model, groups)
    fresh = DeepSpeedEngine(model, cfg, groups)
    checkpoint.restore(checkpoint.Reader(checkpoint.find(run_dir)), fresh, groups)
    outcomes = []
    for each in (engine, fresh):
        loss, _ = run_step(each, loader, cfg.total_steps, cfg, groups)
        outcomes.append((loss, float(each.step(1e-3)), each.model.state_dict()))
    (loss, norm, weights), (fresh_loss, fresh_norm, fresh_weights) = outcomes
    same = all(torch.equal(weights[name], fresh_weights[name]) for name in weights)
    return same and loss == fresh_loss and norm == fresh_norm


def reload_elsewhere(run_dir: Path, cfg: config.Config, single: PlainEngine) -> float:
    """Load the two-rank checkpoint into one plain process: largest difference to the engine that was never sharded."""
    fresh = PlainEngine(MobileMoE(cfg.model), cfg.optim)
    checkpoint.restore(checkpoint.Reader(checkpoint.find(run_dir)), fresh, Groups())
    worst = 0.0
    for ours, want in zip(fresh.model.parameters(), single.model.parameters(), strict=True):
        state, expected = fresh.optimizer.state[ours], single.optimizer.state[want]
        assert state["step"] == expected["step"] == cfg.total_steps
        pairs = [(ours, want), *((state[k], expected[k]) for k in ("exp_avg", "exp_avg_sq"))]
        worst = max(worst, *(float((a - b).detach().abs().max()) for a, b in pairs))
    return worst


def build(cfg: config.Config) -> MobileMoE:
    model = MobileMoE(cfg.model)
    model.init_weights(cfg.train.seed)
    if cfg.moe.dispatch == "drop_and_pad":
        for layer in model.moe_layers():
            layer.dispatcher.capacity_factor = cfg.moe.capacity_factor
    return model.train()


def run_step(engine: Engine, loader: Loader, step: int, cfg: config.Config, groups: Groups) -> tuple[float, float]:
    """Forward and backward of one global batch, and the bias update; returns its mean loss and dropped slots."""
    rows = cfg.train.global_batch_tokens // cfg.data.seq_len
    batches = list(loader.micro_batches(step, rows, cfg.train.micro_batch_size, groups.rank, groups.world))
    scored = groups.sum(torch.tensor(float(sum(b.num_scored for b in batches))))
    sums, counts = torch.zeros(2, dtype=torch.float64), 0
    for batch in batches:
        losses = engine.forward(batch)
        z_loss = losses.z_loss_sum / cfg.train.global_batch_tokens
        engine.backward((losses.cross_entropy_sum / scored + cfg.moe.z_loss_weight * z_loss) * engine.loss_scale)
        sums += torch.stack([losses.cross_entropy_sum.detach(), losses.dropped_L.sum()]).double()
        counts = counts + losses.counts_LE
    biases = [layer.expert_bias for layer in engine.model.moe_layers()]
    update_expert_bias(biases, groups.sum(counts), cfg.moe.bias_update_rate)
    loss, dropped = groups.sum(sums).tolist()
    return loss / float(scored), dropped


if __name__ == "__main__":
    main()
