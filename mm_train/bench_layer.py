"""Forward and backward pass of one MoE layer, beside Python loops over experts and Hugging Face's nearest layer.

python -m mm_train.bench_layer configs/model/s.yaml
python -m mm_train.bench_layer configs/model/s.yaml --tokens 16384 --dtype bfloat16 --json

All layers have the same weights, in float32 as in training, and get the same tokens; before anything is timed, outputs
and all gradients are compared. They take turns, so that what else the machine does hits them alike, and ratios are of
turns that followed each other. bfloat16 is that of training: ours casts by itself, the others run under autocast, with
their routers kept out of it, or they would choose other experts.

What the others are spared: ours computes statistics and the z-loss of the router in its forward pass, and breaks ties
between experts by rule. What they have to do beyond ours: nothing. Drop-and-pad drops tokens and computes padding: it
is other work, so it is timed, but not compared. The ways themselves are in bench_layer_ways.py.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.linear import better_in_float32
from mm_train import config, rules
from mm_train.bench_layer_ways import WEIGHTS, Way, ways
from mm_train.bench_train import check_comparable
from mm_train.cli import UserError, command

CHECK_TOKENS = 256  # enough to compare results, and few enough for a slow way
# Relative errors over all elements: sums in another order; values rounded to 8 bits on the way.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}
PHASES = ("forward", "backward", "both")


@dataclass(frozen=True)
class Turn:
    """What one forward and backward pass took: seconds of the clock by phase, and of all cores ("processor")."""

    forward: float
    backward: float
    both: float
    processor: float


def take_turn(way: Way, x_TD: Tensor, dy_TD: Tensor) -> tuple[Tensor, Turn]:
    """y_TD and what it took; the gradients are left in place."""
    way.zero_grad(set_to_none=True)
    x_TD.grad = None
    begun, processor = _now(x_TD.device), time.process_time()
    y_TD = way(x_TD)
    between = _now(x_TD.device)
    y_TD.backward(dy_TD)
    ended = _now(x_TD.device)
    taken = Turn(between - begun, ended - between, ended - begun, time.process_time() - processor)
    return y_TD.detach(), taken


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def errors(found: dict[str, Way], x_TD: Tensor, dy_TD: Tensor, tolerance: float) -> dict[str, dict[str, float]]:
    """For each way that is compared, ||its - the first's|| / ||the first's|| of the output and every gradient.

    Raises UserError where one is beyond the tolerance.
    """
    facts: dict[str, dict[str, float]] = {}
    expected: dict[str, Tensor] = {}
    for name, way in found.items():
        y_TD, _taken = take_turn(way, x_TD, dy_TD)
        if not way.compared:
            continue
        assert x_TD.grad is not None
        got = {"output": y_TD, "input": x_TD.grad} | dict(zip(WEIGHTS, way.gradients(), strict=True))
        expected = expected or got
        facts[name] = {k: ((got[k].float() - v.float()).norm() / v.float().norm()).item() for k, v in expected.items()}
        for part, error in facts[name].items():
            if not error <= tolerance:  # NaN is not
                raise UserError(
                    f"{name} computes something else: the relative error of {part} is {error:.1e},"
                    f" and at most {tolerance:g} would be rounding"
                )
    return facts


def measure(model: config.Model, tokens: int, repeats: int, dtype_name: str, patience: float) -> dict[str, Any]:
    """Errors, seconds and ratios of each way in one dtype."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype: torch.dtype = getattr(torch, dtype_name)
    found = ways(model, dtype, device)
    first = next(iter(found))
    generator = torch.Generator().manual_seed(0)
    x_TD, dy_TD = (torch.randn(tokens, model.hidden_size, generator=generator).to(device, dtype) for _ in range(2))
    few = min(tokens, CHECK_TOKENS)
    few_x_TD, few_dy_TD = x_TD[:few].clone().requires_grad_(), dy_TD[:few]
    wrong_by = errors(found, few_x_TD, few_dy_TD, TOLERANCE[dtype_name])
    expected = {name: expected_seconds(way, few_x_TD, few_dy_TD, tokens) for name, way in found.items()}
    timed = {name: way for name, way in found.items() if name == first or expected[name] <= patience}
    x_TD.requires_grad_()
    turns: dict[str, list[Turn]] = {name: [] for name in timed}
    with tqdm(total=(1 + repeats) * len(timed), desc=dtype_name, unit="turn", disable=None, leave=False) as bar:
        for number in range(1 + repeats):  # the first warms up
            for name, way in timed.items():
                _y_TD, taken = take_turn(way, x_TD, dy_TD)
                way.zero_grad(set_to_none=True)
                if number:
                    turns[name].append(taken)
                bar.update()
    return summary(found, turns, wrong_by, expected)


def expected_seconds(way: Way, x_TD: Tensor, dy_TD: Tensor, tokens: int) -> float:
    """Of a turn with that many tokens, from turns with those given and with a quarter of them."""
    quarter = max(1, len(x_TD) // 4)
    less_x_TD = x_TD[:quarter].detach().requires_grad_()
    # The better of two: other work on the machine only adds.
    whole = min(take_turn(way, x_TD, dy_TD)[1].both for _ in range(2))
    less = min(take_turn(way, less_x_TD, dy_TD[:quarter])[1].both for _ in range(2))
    slope = max(0.0, whole - less) / max(1, len(x_TD) - quarter)
    return whole + slope * (tokens - len(x_TD))


def summary(
    found: dict[str, Way],
    turns: dict[str, list[Turn]],
    wrong_by: dict[str, dict[str, float]],
    expected: dict[str, float],
) -> dict[str, Any]:
    """What is printed of one dtype. `times_the_first` are medians over turns of the same round; `turns` lacks what was
    left out."""
    first, *_ = turns.values()
    facts: dict[str, dict[str, Any]] = {}
    for name in found:
        facts[name] = {"errors": wrong_by.get(name, {}), "expected_seconds": expected[name]}
        if name not in turns:
            continue
        seconds, base = ([asdict(turn) for turn in column] for column in (turns[name], first))
        ratios = {key: [a[key] / b[key] for a, b in zip(seconds, base, strict=True)] for key in seconds[0]}
        facts[name] |= {
            "seconds": seconds,
            "median": {key: statistics.median(turn[key] for turn in seconds) for key in seconds[0]},
            "times_the_first": {key: statistics.median(column) for key, column in ratios.items()},
            "spread": [min(ratios["both"]), max(ratios["both"])],
        }
    others = [name for name, way in list(found.items())[1:] if way.compared and name in turns]
    best = min(others, key=lambda name: facts[name]["times_the_first"]["both"], default=None)
    return {"ways": facts, "best_of_the_others": best}


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.bench_layer", description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+", help="model file, then key=value; weights and tokens are random")
    parser.add_argument("--tokens", type=int, default=4096, help="of a forward pass (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=7, help="measurements of each way (default %(default)s)")
    parser.add_argument("--dtype", default="float32,bfloat16", help="of the activations (default %(default)s)")
    parser.add_argument(
        "--patience", type=float, default=60, help="leave out what takes more seconds (default %(default)s)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="cores (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the facts as JSON")
    args = parser.parse_args(argv)
    if min(args.tokens, args.repeats, args.threads) < 1:
        raise UserError("--tokens, --repeats and --threads must be at least 1")
    dtypes = args.dtype.split(",")
    for name in dtypes:
        if name not in TOLERANCE:
            raise UserError(f"--dtype has {name!r}; known are {', '.join(TOLERANCE)}, with commas between them")
    model = config.load_words(args.config, check=lambda cfg: rules.validate_model(cfg.model)).model
    check_comparable(model)
    torch.set_num_threads(args.threads)
    facts = {
        "model": model.name,
        "tokens": args.tokens,
        "repeats": args.repeats,
        "device": _device(),
        "threads": torch.get_num_threads(),
        "dtypes": {name: measure(model, args.tokens, args.repeats, name, args.patience) for name in dtypes},
    }
    print(json.dumps(facts, indent=1) if args.json else text(facts))
    return 0


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    slow = better_in_float32(torch.empty(0, dtype=torch.bfloat16))
    return f"CPU ({torch.backends.cpu.get_cpu_capability()}, bfloat16 products {'in float32' if slow else 'by oneDNN'})"


def text(facts: dict[str, Any]) -> str:
    """The tables."""
    lines = [
        f"one MoE layer of {facts['model']}, {facts['tokens']:,} tokens; {facts['device']}, {facts['threads']} threads",
        f"milliseconds, medians of {facts['repeats']} turns; x: times the first, medians over rounds",
    ]
    for dtype, measured in facts["dtypes"].items():
        head = "".join(f" {phase:>9s} {'x':>6s}" for phase in PHASES)
        lines.append(f"{dtype:34s}{head} {'lowest..highest':>15s} {'processor x':>11s} {'error':>7s}")
        for name, way in measured["ways"].items():
            error = f"{max(way['errors'].values()):.0e}" if way["errors"] else "-"
            if "seconds" not in way:
                left_out = f"left out: some {way['expected_seconds']:.0f} s a turn"
                lines.append(f"  {name:32s} {left_out:76s} {error:>7s}")
                continue
            times = way["times_the_first"]
            cells = "".join(f" {way['median'][phase] * 1e3:9,.1f} {times[phase]:6.2f}" for phase in PHASES)
            spread = "{:.2f}..{:.2f}".format(*way["spread"])
            lines.append(f"  {name:32s}{cells} {spread:>15s} {times['processor']:11.2f} {error:>7s}")
        if best := measured["best_of_the_others"]:
            ratio = measured["ways"][best]["times_the_first"]["both"]
            lines.append(f"  best of the others: {best}, {ratio:.2f} times as long as the first")
    lines.append("processor: seconds of all cores together; error: largest relative one of output and gradients")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
