"""Train one stage: one process, or many under torchrun; the same command again resumes.

python -m mm_train.train configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml run.dir=runs/try
torchrun --nproc-per-node 2 -m mm_train.train MODEL.yaml STAGE.yaml parallel.expert_parallel=2 run.dir=runs/try
"""

import argparse
import json
import math
import resource
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from mm_train import config
from mm_train.cli import UserError, command


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.train",
        description="Train one stage. Running the same command again resumes from the last checkpoint.",
        epilog="Every key is in mm_train/config.py. YAML files merge left to right; key.sub=value overrides come last.",
    )
    parser.add_argument("configs", nargs="+", metavar="FILE.yaml | key=value", help="config files, then overrides")
    args = parser.parse_args(argv)
    cfg = config.load_words(args.configs)
    done = Path(cfg.run.dir) / "DONE"
    if done.exists():
        print(f"{cfg.run.stage}: already finished ({done}); remove the run folder to train it again")
        return 0
    train(cfg)
    return 0


def train(cfg: config.Config) -> None:
    """Run the stage to its end. Raises UserError for inputs that cannot work, before anything is trained."""
    import torch

    from mm_train import checkpoint, optim
    from mm_train.data import Loader, open_sources
    from mm_train.files import write_atomic
    from mm_train.inventory import active_parameters
    from mm_train.metrics import Metrics
    from mm_train.model import MobileMoE
    from mm_train.model_folder import check_same_tokenizer, load_weights
    from mm_train.parallel import build_engine, init_groups, shard_experts
    from mm_train.quant import FakeQuant, enable_fake_quant
    from mm_train.statistics import Interval, progress
    from mm_train.tokenizer import check_vocabulary, load_tokenizer
    from mm_train.validate import validate

    started = time.perf_counter()
    run_dir = Path(cfg.run.dir)

    # --- data and place -------------------------------------------------------------------------------------------
    loader = Loader(cfg.data.path, cfg.data.mixture, cfg.data.seq_len, cfg.train.seed)
    held_out = open_sources(cfg.data.path, cfg.data.validation, "val", cfg.data.seq_len)
    tokenizer = load_tokenizer(cfg.data.path)
    check_vocabulary(tokenizer, cfg.model)
    groups = init_groups(cfg.parallel)
    global_rows = cfg.train.global_batch_tokens // cfg.data.seq_len
    micro_steps = cfg.micro_steps(groups.world)
    resume_from = checkpoint.latest(run_dir)
    reader = checkpoint.Reader(resume_from) if resume_from else None
    if reader is not None:
        reader.check_model(cfg.model)
        checkpoint.check_data(reader, loader.fingerprint, global_rows)
        if reader.manifest["step"] > cfg.total_steps:
            raise UserError(
                f"{resume_from} is beyond train.tokens: {reader.manifest['step']} steps done, {cfg.total_steps} wanted"
            )

    # --- model: built whole, then changed from outside, in this order ---------------------------------------------
    model = MobileMoE(cfg.model, getattr(torch, cfg.train.dtype))
    model.init_weights(cfg.train.seed)
    if cfg.init_from and reader is None:
        load_weights(model, Path(cfg.init_from))
        check_same_tokenizer(Path(cfg.init_from), tokenizer, cfg.data.path)
    if cfg.moe.dispatch == "drop_and_pad":
        for layer in model.moe_layers():
            layer.dispatcher.capacity_factor = cfg.moe.capacity_factor
    if cfg.quant.enabled:
        enable_fake_quant(model, FakeQuant.of(cfg.quant))
    num_parameters = sum(p.numel() for p in model.parameters())
    shard_experts(model, groups)
    model.to(groups.device).train()
    engine = build_engine(model, cfg, groups)
    first_step = 0
    if reader is not None:
        checkpoint.restore(reader, engine, groups)
        first_step = reader.manifest["step"]

    # --- log ------------------------------------------------------------------------------------------------------
    metrics = Metrics(
        run_dir,
        is_main=groups.is_main,
        wandb_mode=cfg.log.wandb,
        config=asdict(cfg),
        project=cfg.log.project,
        run_name=f"{cfg.model.name}-{cfg.run.stage}",
    )
    if groups.is_main:
        config.save(cfg, run_dir / "config.yaml")
        tokenizer.save(run_dir)
    metrics.run(
        stage=cfg.run.stage,
        model=cfg.model.name,
        total_steps=cfg.total_steps,
        first_step=first_step,
        world=groups.world,
        expert_parallel=groups.ep_size,
        micro_steps=micro_steps,
        params_total=num_parameters,
        params_active=sum(active_parameters(cfg.model).values()),
        global_batch_tokens=cfg.train.global_batch_tokens,
        seq_len=cfg.data.seq_len,
        epochs=loader.mixture.epochs(cfg.total_steps * global_rows),
    )
    if first_step:
        metrics.say(f"resuming after step {first_step} from {resume_from}")
    biases = [layer.expert_bias for layer in model.moe_layers()]
    interval = Interval(cfg, groups)

    def held_out_scores(step: int) -> None:
        for source, score in validate(
            model,
            held_out,
            tokenizer.token_bytes(),
            cfg.data.seq_len,
            cfg.train.micro_batch_size,
            groups,
            cfg.train.validation_tokens,
        ).items():
            metrics.validation(step, source, **asdict(score))

    def save_checkpoint(step: int) -> None:
        begun = time.perf_counter()
        facts = {"samples": step * global_rows, "data_fingerprint": loader.fingerprint}
        folder = checkpoint.save(run_dir, step, engine, groups, cfg, facts)
        size = sum(f.stat().st_size for f in folder.iterdir())
        metrics.checkpoint(step, seconds=time.perf_counter() - begun, bytes=size)

    # --- the loop -------------------------------------------------------------------------------------------------
    if first_step == 0 and held_out and not cfg.init_from:  # a later stage starts where the stage before ended
        held_out_scores(0)
    interval.start()
    for step in progress(range(first_step, cfg.total_steps), cfg, groups):
        begun = time.perf_counter()
        batches = list(loader.micro_batches(step, global_rows, cfg.train.micro_batch_size, groups.rank, groups.world))
        interval.data_seconds += time.perf_counter() - begun
        scored = groups.sum(torch.tensor(float(sum(b.num_scored for b in batches)), device=groups.device))
        scored.clamp_(min=1)  # a batch may have nothing to score
        for batch in batches:
            losses = engine.forward(batch.to(groups.device))
            loss = losses.cross_entropy_sum / scored
            z_loss = losses.z_loss_sum / cfg.train.global_batch_tokens
            engine.backward((loss + cfg.moe.z_loss_weight * z_loss) * engine.loss_scale)
            interval.add_micro(losses)
        rate = optim.learning_rate(step, cfg.total_steps, cfg.optim)
        grad_norm = float(engine.step(rate))
        if not 0 <= grad_norm < math.inf:  # DeepSpeed reports -1 for NaN
            raise UserError(
                f"training diverged: the gradient norm of step {step + 1} is {grad_norm}; the last checkpoint is"
                f" {checkpoint.latest(run_dir)}; try a lower optim.lr (now {cfg.optim.lr}) or more optim.warmup_steps"
            )
        counts_LE = interval.finish_step(float(scored))
        optim.update_expert_bias(biases, counts_LE, cfg.moe.bias_update_rate)

        trained = time.perf_counter()
        finished = step + 1
        last = finished == cfg.total_steps
        if finished % cfg.log.every == 0 or last:
            values = interval.values(finished) | {"lr": rate, "grad_norm": grad_norm}
            memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            metrics.train(finished, **values, seconds=time.perf_counter() - started, memory_gib=memory)
            interval.start()
            trained = time.perf_counter()
        if held_out and (last or (cfg.train.validate_every and finished % cfg.train.validate_every == 0)):
            held_out_scores(finished)
        if last or finished % cfg.checkpoint.every == 0:
            save_checkpoint(finished)
        interval.exclude(time.perf_counter() - trained)

    if groups.is_main:
        summary = {"step": cfg.total_steps, "tokens": cfg.total_steps * cfg.train.global_batch_tokens}
        write_atomic(run_dir / "DONE", (json.dumps(summary) + "\n").encode())
    metrics.done(cfg.total_steps, seconds=time.perf_counter() - started)
    metrics.close()
    groups.close()


if __name__ == "__main__":
    sys.exit(main())
