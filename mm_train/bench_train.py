"""Tokens per second of training, beside a Hugging Face transformers model of the same shape in a plain loop.

python -m mm_train.bench_train configs/model/tiny.yaml
python -m mm_train.bench_train configs/model/tiny.yaml configs/stage/tiny/pretrain.yaml --json   # on the stage's data
python -m mm_train.bench_train configs/model/s.yaml train.dtype=bfloat16 --alone   # this trainer only, one process

Every way trains the same shape on the same rows in the same micro-batches, with the same AdamW and clipping, in
processes of its own, and all ways share the same cores: one process uses them all, R ranks a part each. They take turns
and wait for each other, so that what else the machine does hits them alike; all stay in memory.

What transformers is spared: its attention crosses documents (no mask), and it has no z-loss, no balancing of the
experts and no statistics. It drops no tokens: moe.dispatch=dropless, the default without a stage file, is the same
work. batched_mm, its third way to run experts, copies an expert's weights for every token and is made for decoding: a
step of the tiny model takes minutes. Torch-free; what trains is bench_train_worker.py.
"""

import argparse
import json
import math
import os
import socket
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any

from mm_train import config, costs, rules
from mm_train.cli import UserError, command

ALIKE = 0.02  # by how much the numbers of parameters may differ
WARM_UP = 2  # steps before anything is measured
WAITING_ENDS = 10.0  # seconds for the other ranks to leave when one has failed


@dataclass(frozen=True)
class Way:
    """One way of training; `experts` is transformers' experts_implementation, "" for this trainer."""

    name: str
    cfg: config.Config
    ranks: int = 1
    experts: str = ""


def ways(cfg: config.Config, ranks: int) -> list[Way]:
    """What is compared; the first is what the others are measured by. Raises UserError for what cannot be."""
    found = [Way("this trainer, 1 process", _laid_out(cfg, 1, 1))]
    if ranks > 1:
        for expert_parallel in (ranks, 1):
            name = f"this trainer, {ranks} ranks, expert_parallel={expert_parallel}"
            found.append(Way(name, _laid_out(cfg, ranks, expert_parallel), ranks))
    alone = _laid_out(cfg, 1, 1)
    return found + [Way(f"transformers, experts {e}", alone, experts=e) for e in ("grouped_mm", "eager")]


def _laid_out(cfg: config.Config, ranks: int, expert_parallel: int) -> config.Config:
    parallel = replace(cfg.parallel, engine="auto", expert_parallel=expert_parallel, tensor_parallel=1)
    laid_out = replace(cfg, parallel=parallel)
    rules.validate_training(laid_out)
    laid_out.micro_steps(ranks)
    return laid_out


class Runner:
    """The processes of one way, which train when they are told to."""

    def __init__(self, way: Way, threads: int) -> None:
        self.way = way
        self._stderr = tempfile.TemporaryFile("w+")  # noqa: SIM115
        environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
        environment["OMP_NUM_THREADS"] = str(max(1, threads // way.ranks))
        if way.ranks > 1:
            environment |= {"WORLD_SIZE": str(way.ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
        self.processes = []
        for rank in range(way.ranks):
            place = {"RANK": str(rank), "LOCAL_RANK": str(rank)} if way.ranks > 1 else {}
            self.processes.append(
                subprocess.Popen(
                    [sys.executable, "-m", "mm_train.bench_train_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=self._stderr,
                    text=True,
                    env=environment | place,
                )
            )

    def start(self) -> dict[str, Any]:
        """Build and warm up; returns the number of parameters, the device's name and its peak FLOPs a second (or None).

        Raises UserError when a process fails.
        """
        answers = self._ask({"cfg": asdict(self.way.cfg), "experts": self.way.experts, "steps": WARM_UP})
        return {key: answers[0][key] for key in ("parameters", "device", "peak_flops", "torch")}

    def measure(self, steps: int) -> tuple[float, float, dict[str, float]]:
        """(tokens/s over `steps` more steps, loss of the last, peak memory so far by kind, in GiB over all processes).

        Raises UserError when a process fails.
        """
        answers = self._ask({"steps": steps})
        seconds = max(answer["seconds"] for answer in answers)
        memory = {kind: sum(answer["memory_gib"][kind] for answer in answers) for kind in answers[0]["memory_gib"]}
        return steps * self.way.cfg.train.global_batch_tokens / seconds, answers[0]["loss"], memory

    def _ask(self, request: dict[str, Any]) -> list[dict[str, Any]]:
        """Every process's answer to one line of JSON."""
        try:
            for process in self.processes:
                assert process.stdin is not None
                process.stdin.write(json.dumps(request) + "\n")
                process.stdin.flush()
            return [json.loads(process.stdout.readline()) for process in self.processes if process.stdout is not None]
        except (OSError, json.JSONDecodeError):  # it has gone
            raise UserError(f"{self.way.name}: {self._last_words()}") from None

    def _last_words(self) -> str:
        """What a failed process said: our own error if there is one, else its last line."""
        for process in self.processes:
            try:
                process.wait(WAITING_ENDS)
            except subprocess.TimeoutExpired:
                process.kill()
        self._stderr.seek(0)
        lines = [line.strip() for line in self._stderr if line.strip()]
        said = [line.partition("error: ")[2] for line in lines if "error: " in line]
        return (said or lines[-1:] or ["ended without a word"])[0]

    def close(self) -> None:
        """End the processes."""
        for process in self.processes:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    pipe.close()
        self._stderr.close()


def compare(all_ways: Sequence[Way], threads: int, steps: int, repeats: int) -> dict[str, dict[str, Any]]:
    """For each way what `Runner.start` says, tokens/s of every repeat, last loss and peak memory, measured in turns."""
    with ExitStack() as stack:
        runners = []
        for way in all_ways:
            print(f"starting {way.name} ...", file=sys.stderr, flush=True)
            runners.append(Runner(way, threads))
            stack.callback(runners[-1].close)
        facts: dict[str, dict[str, Any]]
        facts = {
            r.way.name: r.start() | {"ranks": r.way.ranks, "tokens_per_second": [], "loss": math.nan} for r in runners
        }
        for _ in range(repeats):
            for runner in runners:
                its = facts[runner.way.name]
                speed, its["loss"], its["memory_gib"] = runner.measure(steps)
                its["tokens_per_second"].append(speed)
    return facts


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.bench_train", description=__doc__.splitlines()[0])
    parser.add_argument(
        "config",
        nargs="+",
        help="model file, then stage files and key=value; without a stage's data.mixture the tokens are random",
    )
    parser.add_argument("--steps", type=int, default=5, help="optimizer steps of a measurement (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="measurements of each way (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=2, help="1: do without several ranks (default %(default)s)")
    parser.add_argument("--threads", type=int, default=_cores(), help="cores for each way (default: all, %(default)s)")
    parser.add_argument("--alone", action="store_true", help="this trainer in one process, beside nothing else")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    if min(args.steps, args.repeats, args.ranks, args.threads) < 1:
        raise UserError("--steps, --repeats, --ranks and --threads must be at least 1")
    cfg = config.load_words(args.config, check=rules.validate_training)
    if not args.alone:
        check_comparable(cfg.model)
    chosen = [Way("this trainer, 1 process", _laid_out(cfg, 1, 1))] if args.alone else ways(cfg, args.ranks)
    found = compare(chosen, args.threads, args.steps, args.repeats)
    facts = summary(cfg, found) | {key: getattr(args, key) for key in ("steps", "repeats", "threads")}
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0


def check_comparable(model: config.Model) -> None:
    """Raise UserError for a shape that transformers' architecture of the worker does not have."""
    if not model.num_local_experts:
        raise UserError(f"{model.name} is dense: there are no experts to compare")
    if model.scoring_func != "sigmoid":
        raise UserError(f"model.scoring_func is {model.scoring_func!r}; the model to compare with has sigmoid routing")
    shared, routed = model.intermediate_size_mlp, model.intermediate_size
    if shared == 0 or shared % routed:
        raise UserError(
            f"model.intermediate_size_mlp ({shared}) must be a multiple of intermediate_size ({routed}), and not 0:"
            " the model to compare with counts its shared experts in routed ones"
        )


def summary(cfg: config.Config, found: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """What is printed. `times_the_first` is the median over measurements that followed each other.

    `mfu` is the model's FLOPs in a second (costs.train_flops) over the peak of the devices; None where that is unknown,
    and for transformers, whose attention does other work.

    Raises UserError when the models compared are not of the same size.
    """
    first, *_ = found.values()
    for name, facts in found.items():
        if name.startswith("transformers") and abs(facts["parameters"] / first["parameters"] - 1) > ALIKE:
            raise UserError(
                f"{name} has {facts['parameters']:,} parameters and this trainer's model {first['parameters']:,}:"
                f" more than {ALIKE:.0%} apart, which is no comparison"
            )
    flops = sum(costs.train_flops(cfg.model, cfg.data.seq_len).values())
    for name, facts in found.items():
        speeds = facts["tokens_per_second"]
        facts["median"] = statistics.median(speeds)
        ratios = [speed / base for speed, base in zip(speeds, first["tokens_per_second"], strict=True)]
        facts["times_the_first"] = statistics.median(ratios)
        peak = None if name.startswith("transformers") else facts.get("peak_flops")
        facts["mfu"] = facts["median"] * flops / (peak * facts["ranks"]) if peak else None
    return {
        "model": cfg.model.name,
        "tokens_of_a_step": cfg.train.global_batch_tokens,
        "tokens_of_a_row": cfg.data.seq_len,
        "rows_of_a_micro_batch": cfg.train.micro_batch_size,
        "dtype": cfg.train.dtype,
        "dispatch": cfg.moe.dispatch,
        "data": cfg.data.path if cfg.data.mixture else "random tokens",
        "ways": found,
    }


def text(facts: dict[str, Any]) -> str:
    """The table."""
    lines = [
        f"{facts['model']}: steps of {facts['tokens_of_a_step']:,} tokens in micro-batches of"
        f" {facts['rows_of_a_micro_batch']} x {facts['tokens_of_a_row']:,}, {facts['dtype']}, {facts['dispatch']};"
        f" {facts['data']}",
        f"{facts['threads']} threads; {facts['repeats']} measurements of {facts['steps']} steps each, in turns",
        f"  {'':44s} {'parameters':>13s} {'tokens/s':>9s} {'lowest..highest':>18s} {'ratio':>6s} {'loss':>6s}"
        f" {'GiB':>6s} {'MFU':>6s}",
    ]
    for name, way in facts["ways"].items():
        speeds = way["tokens_per_second"]
        span = f"{min(speeds):,.0f}..{max(speeds):,.0f}"
        lines.append(
            f"  {name:44s} {way['parameters']:13,d} {way['median']:9,.0f} {span:>18s}"
            f" {way['times_the_first']:6.2f} {way['loss']:6.2f} {_peak_gib(way):>6s} {_percent(way['mfu']):>6s}"
        )
    if len(facts["ways"]) > 1:
        lines.append(
            "transformers has weights in its norms of queries and keys; ratio: times as fast as the first line"
        )
    lines.append("GiB: peak memory, of the GPU where there is one, of all processes together")
    return "\n".join(lines)


def _peak_gib(way: dict[str, Any]) -> str:
    memory = way.get("memory_gib", {})
    return f"{memory.get('device', memory['host']):.1f}" if memory else "-"


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def _cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


if __name__ == "__main__":
    sys.exit(main())
