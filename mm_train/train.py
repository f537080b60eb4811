"""Train one stage: one process, or many under torchrun; the same command again resumes.

python -m mm_train.train configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml run.dir=runs/try
torchrun --nproc-per-node 2 -m mm_train.train MODEL.yaml STAGE.yaml parallel.expert_parallel=2 run.dir=runs/try
"""

import argparse
import contextlib
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_train import config
from mm_train.cli import LostContact, UserError, command
from mm_train.stopping import STOPPED, StopRequest

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np

    from mm_train.parallel.groups import Groups
    from mm_train.profiling import Profiler
    from mm_train.shards import ShardReader
    from mm_train.tokenizer import Tokenizer
    from mm_train.trainer import Trainer
    from mm_train.watchdog import Watchdog
    from mm_train.weights import Source

EPILOG = f"""Every key is in mm_train/config.py. YAML files merge left to right; key.sub=value overrides come last.

SIGTERM, SIGUSR1 or a file STOP in the run folder end the run after a checkpoint, with exit status {STOPPED}.
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.train",
        description="Train one stage. Running the same command again resumes from the last checkpoint.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("configs", nargs="+", metavar="FILE.yaml | key=value", help="config files, then overrides")
    args = parser.parse_args(argv)
    cfg = config.load_words(args.configs)
    done = Path(cfg.run.dir) / "DONE"
    if done.exists():
        _refuse_more(cfg, done)
        print(f"{cfg.run.stage}: already finished ({done}); remove the run folder to train it again")
        return 0
    return train(cfg)


def _refuse_more(cfg: config.Config, done: Path) -> None:
    """Raise UserError when a finished run is to go on: it would have to take back its last steps."""
    try:
        steps = int(json.loads(done.read_bytes())["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return
    if cfg.total_steps > steps:
        before = ", which the decay of schedule wsd must not have reached" if cfg.decay_from is not None else ""
        raise UserError(
            f"{cfg.run.dir} is finished after {steps} steps, and train.tokens ({cfg.train.tokens}) makes"
            f" {cfg.total_steps}: go on in another run.dir, with resume_from= one of its checkpoints{before}"
        )


def train(cfg: config.Config) -> int:
    """Run the stage to its end (0), or to a stop on request (STOPPED).

    Raises UserError for inputs that cannot work, before anything is trained, and when training diverges.
    """
    with StopRequest(cfg.run.dir, is_main=os.environ.get("RANK", "0") == "0") as stop:  # before the slow imports
        from mm_train.parallel.groups import init_groups, lost_contact
        from mm_train.watchdog import Watchdog

        groups = init_groups(cfg.parallel, cfg.faults.hang_seconds)
        watchdog = Watchdog(cfg.run.dir, groups.rank, groups.world, cfg.faults.hang_seconds)
        with watchdog, contextlib.ExitStack() as held:
            try:
                status = _train(cfg, groups, stop, watchdog, held)
            except RuntimeError as error:
                if groups.world > 1 and lost_contact(error):
                    raise LostContact(f"lost contact with another rank, which says why: {error}") from None
                raise
            groups.close()  # only now: with a rank gone, leaving in order could wait for it
        return status


def _train(
    cfg: config.Config, groups: "Groups", stop: StopRequest, watchdog: "Watchdog", held: contextlib.ExitStack
) -> int:
    import torch

    from mm_train import budget, data_plan, optim_groups
    from mm_train.block_cache import BlockCache
    from mm_train.checkpoint.folders import find
    from mm_train.checkpoint.reader import Reader, open_newest
    from mm_train.data import Loader, open_sources
    from mm_train.files import locked, write_atomic, writing
    from mm_train.inventory import active_parameters, parameters
    from mm_train.metrics import Metrics
    from mm_train.parallel.assemble import assemble
    from mm_train.parallel.engine import build_engine
    from mm_train.parallel.groups import uses_deepspeed
    from mm_train.profiling import Profiler
    from mm_train.tokenizer import check_vocabulary, load_tokenizer
    from mm_train.trainer import Trainer
    from mm_train.weights import fill

    started = time.perf_counter()
    run_dir = Path(cfg.run.dir)

    # --- data and place -------------------------------------------------------------------------------------------
    data = cfg.data
    cache = BlockCache(Path(data.cache_dir), int(data.cache_gib * 2**30)) if data.cache_gib else None
    how: dict[str, Any] = {"checked": data.verify, "cache": cache}
    loader = Loader(data.path, data.mixture, data.seq_len, cfg.train.seed, data.workers, data.ahead, **how)
    held.callback(loader.close)
    asked, cfg = cfg, budget.with_tokens(cfg, loader.mixture.num_windows)
    held_out = open_sources(data.path, data.validation, "val", data.seq_len, **how)
    tokenizer = load_tokenizer(cfg.data.path)
    check_vocabulary(tokenizer, cfg.model)
    micro_steps = cfg.micro_steps(groups.world)
    notices: list[str] = []
    reader = open_newest(run_dir, groups, notices.append)
    if reader is None and cfg.resume_from:
        reader = Reader(find(Path(cfg.resume_from))).verify(groups)
    if reader is not None and reader.step > cfg.total_steps:
        raise UserError(f"{reader.folder} is beyond train.tokens: {reader.step} steps done, {cfg.total_steps} wanted")

    # --- model: this rank's part of it, filled from where its values are ------------------------------------------
    torch.manual_seed(cfg.train.seed)  # nothing draws from it today; two runs of one config save the same state
    watchdog.beat(0, "building the model")
    model = assemble(cfg, groups)
    if reader is None:
        fill(model, cfg.model, first_values(cfg, tokenizer, groups), groups.place)
    watchdog.beat(0, "building the engine")
    engine = build_engine(model, cfg, groups)

    # --- log ------------------------------------------------------------------------------------------------------
    if groups.is_main:
        held.enter_context(locked(run_dir))
    metrics = Metrics(
        run_dir,
        is_main=groups.is_main,
        wandb_mode=cfg.log.wandb,
        config=asdict(cfg),
        project=cfg.log.project,
        run_name=f"{cfg.model.name}-{cfg.run.stage}",
    )
    trainer = Trainer(cfg, groups, engine, loader, metrics, watchdog)
    if reader is not None:
        watchdog.beat(0, "loading the checkpoint")
        trainer.resume(reader)
    if groups.is_main:
        config.save(cfg, run_dir / "config.yaml")
        with writing(run_dir):
            tokenizer.save(run_dir)
    metrics.run(
        stage=cfg.run.stage,
        model=cfg.model.name,
        total_steps=cfg.total_steps,
        first_step=trainer.step,
        world=groups.world,
        expert_parallel=groups.place.ep_size,
        tensor_parallel=groups.place.tp_size,
        zero_stage=cfg.parallel.zero_stage if uses_deepspeed(cfg.parallel, groups.world) else 0,
        micro_steps=micro_steps,
        params_total=sum(parameters(cfg.model).values()),
        params_active=sum(active_parameters(cfg.model).values()),
        global_batch_tokens=cfg.train.global_batch_tokens,
        seq_len=cfg.data.seq_len,
        data_mixture={name: quota / 1000 for name, quota in loader.mixture.quotas.items()},
        epochs=loader.mixture.epochs(cfg.total_steps * trainer.rows),
    )
    if told := budget.said(asked, cfg):
        metrics.say(told)
    for line in optim_groups.lines(optim_groups.table(cfg.model, cfg.optim)):
        metrics.say(line)
    plan = data_plan.plan(loader.mixture, cfg.data.seq_len, cfg.total_steps * trainer.rows)
    for line in data_plan.lines(plan):
        metrics.say(line)
    repeated = data_plan.too_often(plan, cfg.data.max_epochs)
    if repeated and trainer.step == 0:
        metrics.alert(0, "data repeated", repeated)
    for notice in notices:
        metrics.alert(trainer.step, "damaged checkpoint", notice)
    if trainer.schedule_change:
        metrics.alert(trainer.step, "learning rate changed", trainer.schedule_change)
    if trainer.data_change:
        metrics.alert(trainer.step, "data mixture changed", trainer.data_change)
    if reader is not None:
        metrics.say(f"resuming after step {trainer.step} from {reader.folder}")
    trainer.evaluations.resume(trainer.step)
    held.callback(trainer.evaluations.stop)
    with Profiler(cfg.profile.steps, run_dir, groups.rank, groups.device, metrics.say, cfg.total_steps) as profiler:
        run(trainer, profiler, stop, held_out, tokenizer.token_bytes(), started)

    if trainer.step < cfg.total_steps:
        reasons = [reason for reason in groups.gather(stop.wanted()) if reason]
        metrics.stopped(trainer.step, ", ".join(dict.fromkeys(reasons)))
        metrics.close()
        stop.honoured()
        return STOPPED
    if groups.is_main:
        summary = {"step": cfg.total_steps, "tokens": cfg.total_steps * cfg.train.global_batch_tokens}
        with writing(run_dir):
            write_atomic(run_dir / "DONE", (json.dumps(summary) + "\n").encode())
    trainer.evaluations.finish(trainer.step, lambda: watchdog.beat(trainer.step, "evaluation"))
    metrics.done(cfg.total_steps, seconds=time.perf_counter() - started)
    metrics.close()
    return 0


def run(
    trainer: "Trainer",
    profiler: "Profiler",
    stop: StopRequest,
    held_out: "Mapping[str, ShardReader]",
    token_bytes_V: "np.ndarray",
    started: float,
) -> None:
    """The loop: steps with their log, validations and checkpoints, to the end or to a stop on request."""
    from mm_train.alerts import Alerts
    from mm_train.anomalies import diverged
    from mm_train.statistics import progress

    cfg, metrics = trainer.cfg, trainer.metrics
    alerts = Alerts(metrics, quiet_until=cfg.optim.warmup_steps)
    if trainer.step == 0 and held_out and not cfg.init_from:  # a later stage starts where the stage before ended
        trainer.validate(held_out, token_bytes_V)
    trainer.interval.start()
    bar = progress(trainer.step, cfg, trainer.groups)
    stopping = False
    while trainer.step < cfg.total_steps and not stopping:
        profiler.begin(trainer.step + 1)
        outcome = trainer.train_step(stop.wanted() is not None)
        profiler.end(trainer.step)
        step, verdict, stopping = trainer.step, outcome.verdict, outcome.totals.stop
        if verdict.action == "skip":
            metrics.skipped(step, outcome.totals.loss, outcome.norms["total"], trainer.anomalies.skipped_steps)
        elif verdict.action in ("warn", "rollback"):
            metrics.alert(step, "loss spike", verdict.reason)
        elif verdict.action == "stop":
            metrics.alert(step, "training diverges", verdict.reason, level="error")
            trainer.finish_writing()
            raise diverged(step, verdict, trainer.last_checkpoint(), cfg.optim)

        if verdict.action == "rollback" and trainer.roll_back(verdict.reason):
            trainer.interval.start()
        else:
            last = step == cfg.total_steps
            if last or step % cfg.log.every == 0:
                values = trainer.values(outcome)
                metrics.train(step, **values, seconds=time.perf_counter() - started)
                alerts.look(step, values)
                trainer.interval.start()
            if held_out and (last or (cfg.train.validate_every and step % cfg.train.validate_every == 0)):
                trainer.validate(held_out, token_bytes_V)
            # Not in a row of skipped steps: if the weights are what is wrong, the good checkpoints must outlive it.
            due = step % cfg.checkpoint.every == 0 or step == cfg.decay_from
            if last or stopping or (due and verdict.action in ("ok", "warn")):
                trainer.save()
        trainer.report_written()
        bar.update(trainer.step - bar.n)
    bar.close()
    trainer.finish_writing()


def first_values(cfg: config.Config, tokenizer: "Tokenizer", groups: "Groups") -> "Source":
    """Where the weights of a new run come from: `init_from`, or chance."""
    if not cfg.init_from:
        from mm_train.weights import initial

        return initial(cfg.model, cfg.train.seed)
    from mm_train.model_folder import check_same_tokenizer, weight_source

    folder = Path(cfg.init_from)
    model, source = weight_source(folder, groups)
    difference = config.model_difference(cfg.model, model)
    if difference:
        raise UserError(f"init_from {folder} is another model: {difference}")
    check_same_tokenizer(folder, tokenizer, cfg.data.path)
    return source


if __name__ == "__main__":
    sys.exit(main())
