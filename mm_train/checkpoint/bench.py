"""How long training stands still for a checkpoint: written while training goes on, against written at once."""

import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.engine import PlainEngine
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups


def bench(cfg: config.Config, repeats: int, folder: Path) -> dict[str, Any]:
    """Save the model of `cfg`, on the CPU, `repeats` times in either way by turns, to a new folder in `folder`.

    Seconds are medians; `first_stall` is that of the first asynchronous save, which also takes memory for the copy.
    """
    model = MobileMoE(cfg.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02)
    engine = PlainEngine(model, cfg.optim)
    seconds: dict[str, list[float]] = {"synchronous": [], "stalled": [], "written": []}
    cfg.checkpoint.keep = 1
    with tempfile.TemporaryDirectory(dir=folder, prefix="checkpoint-bench-") as name:
        writer = Writer(Path(name), Groups(), cfg)
        step = 0
        for _ in range(1 + repeats):  # the first time is for warming up
            for asynchronous in (False, True):
                step += 1
                cfg.checkpoint.asynchronous = asynchronous
                begun = time.perf_counter()
                stalled = writer.save(step, engine, {})
                writer.wait()
                seconds["stalled" if asynchronous else "synchronous"].append(stalled)
                if asynchronous:
                    seconds["written"].append(time.perf_counter() - begun)
        size = writer.poll()[-1].bytes
    first_stall = seconds["stalled"][0]
    median = {key: statistics.median(values[1:]) for key, values in seconds.items()}
    return {
        "model": cfg.model.name,
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes": size,
        "repeats": repeats,
        "threads": torch.get_num_threads(),
        "synchronous_seconds": median["synchronous"],
        "asynchronous_seconds": median["written"],
        "stalled_seconds": median["stalled"],
        "first_stall_seconds": first_stall,
        "ratio": median["stalled"] / median["synchronous"],
        "all": {key: values[1:] for key, values in seconds.items()},
    }


def bench_text(facts: dict[str, Any]) -> str:
    """Four lines for people."""
    size, spread = facts["bytes"], facts["all"]

    def of(key: str) -> str:
        return f"{min(spread[key]):.3f} to {max(spread[key]):.3f} s"

    return (
        f"{facts['model']}: {facts['parameters']:,} parameters, checkpoint of {size:,} bytes;"
        f" medians of {facts['repeats']}, {facts['threads']} threads\n"
        f"  written at once        {facts['synchronous_seconds']:8.3f} s ({of('synchronous')}),"
        f" {size / 1e6 / facts['synchronous_seconds']:,.0f} MB/s\n"
        f"  written meanwhile      {facts['asynchronous_seconds']:8.3f} s ({of('written')}),"
        f" {size / 1e6 / facts['asynchronous_seconds']:,.0f} MB/s\n"
        f"  training stands still  {facts['stalled_seconds']:8.3f} s ({of('stalled')}),"
        f" {size / 1e6 / facts['stalled_seconds']:,.0f} MB/s; the first time {facts['first_stall_seconds']:.3f} s\n"
        f"  that is {facts['ratio']:.1%} of the time of writing at once"
    )
