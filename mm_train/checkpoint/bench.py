"""How long training stands still for a checkpoint: written while training goes on, against written at once."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.data import Batch
from mm_train.engine import PlainEngine
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.weights import fill, initial

PHASES = ("computing", "synchronous", "saving", "computing_meanwhile", "settling", "written")


def bench(cfg: config.Config, repeats: int, folder: Path) -> dict[str, Any]:
    """Save the model of `cfg`, on the CPU, `repeats` times in either way by turns, to a new folder in `folder`.

    As in training: save, forward and backward of a micro-batch, settle, optimizer step. The asynchronous way stands
    still in save and settle, the synchronous one in save. Seconds are medians.
    """
    model = MobileMoE(cfg.model)
    fill(model, cfg.model, initial(cfg.model, seed=0))
    engine = PlainEngine(model, cfg.optim)
    shape = (cfg.train.micro_batch_size, min(cfg.data.seq_len, cfg.model.max_position_embeddings))
    tokens_BT = torch.randint(0, cfg.model.vocab_size, shape, generator=torch.Generator().manual_seed(0))
    batch = Batch(tokens_BT, tokens_BT, torch.zeros_like(tokens_BT))
    seconds: dict[str, list[float]] = {phase: [] for phase in PHASES}
    cfg.checkpoint.keep = 1
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-bench-") as name:
        writer = Writer(Path(name), Groups(), cfg)
        cfg.checkpoint.asynchronous = True
        writer.reserve(engine)
        for repeat in range(1 + repeats):  # the first time is for warming up
            seconds["computing"].append(_compute(engine, batch))
            engine.step(1e-4)
            cfg.checkpoint.asynchronous = False
            seconds["synchronous"].append(writer.save(2 * repeat + 1, engine, {}))

            cfg.checkpoint.asynchronous = True
            begun = time.perf_counter()
            seconds["saving"].append(writer.save(2 * repeat + 2, engine, {}))
            seconds["computing_meanwhile"].append(_compute(engine, batch))
            seconds["settling"].append(writer.settle())
            engine.step(1e-4)
            writer.wait()
            seconds["written"].append(writer.poll()[-1].seconds)
            assert seconds["written"][-1] <= time.perf_counter() - begun
        size = sum(path.stat().st_size for path in Path(name).glob("checkpoints/step-*/rank-*"))
    seconds["stalled"] = [sum(pair) for pair in zip(seconds["saving"], seconds["settling"], strict=True)]
    median = {f"{key}_seconds": statistics.median(values[1:]) for key, values in seconds.items()}
    return {
        "model": cfg.model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "batch": list(shape),
        **median,
        "ratio": median["stalled_seconds"] / median["synchronous_seconds"],
        "all": {key: values[1:] for key, values in seconds.items()},
    }


def _compute(engine: PlainEngine, batch: Batch) -> float:
    """Forward and backward; seconds."""
    begun = time.perf_counter()
    engine.backward(engine.forward(batch).cross_entropy_sum / batch.num_scored)
    return time.perf_counter() - begun


def bench_text(facts: dict[str, Any]) -> str:
    """Some lines for people."""
    size, spread = facts["bytes"], facts["all"]

    def row(name: str, key: str, written: bool = False) -> str:
        median = facts[f"{key}_seconds"]
        speed = f", {size / 1e6 / median:,.0f} MB/s" if written else ""
        return f"  {name:<24}{median:8.3f} s ({min(spread[key]):.3f} to {max(spread[key]):.3f} s){speed}"

    rows, length = facts["batch"]
    return "\n".join(
        (
            f"{facts['model']}: {facts['parameters']:,} parameters, checkpoint of {size:,} bytes;"
            f" medians of {facts['repeats']}, {facts['threads']} threads",
            f"by turns: written at once; or save, forward and backward of {rows} x {length} tokens, settle, step",
            row("written at once", "synchronous", written=True),
            row("written meanwhile", "written", written=True),
            row("training stands still", "stalled")
            + f": save {facts['saving_seconds']:.3f} s, settle {facts['settling_seconds']:.3f} s",
            row("forward and backward", "computing"),
            row("the same, meanwhile", "computing_meanwhile"),
            f"  that is {facts['ratio']:.1%} of the time of writing at once",
        )
    )
