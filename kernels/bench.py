"""Speed of every kernel beside its reference, torch.compile and other people's kernels, and of a training step.

python -m kernels.bench                                      # S on a GPU; on a CPU a small size, the reference path
python -m kernels.bench --size l --tokens 16384 --json runs/bench/l.json

First the machine's own copy bandwidth and matmul rate are measured: kernels are judged by their share of these, not of
a data sheet. Every way of computing is checked against float32 before it is timed, and run twice to see whether it
repeats bit for bit. What is counted as work is in kernels/bench_cases.py. What cannot run is named, and stops nothing.
Exit status 1 when a kernel of ours is wrong, does not repeat, or cannot run; 2 for bad arguments.
"""

import argparse
import datetime
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from kernels.backend import TRITON_IS_INSTALLED
from kernels.bench_cases import OURS, cases
from kernels.bench_measure import copy_bandwidth, matmul_rate
from kernels.bench_report import heading, text
from kernels.bench_run import run_case
from kernels.bench_step import train_step
from kernels.sizes import SIZES

TOKENS_ON_GPU, TOKENS_ON_CPU = "8192,16384,32768", "512,1024"
COMPILE_UNTIL, OTHERS_UNTIL = 150, 240  # seconds from the start: later, torch.compile, and all but ours, are left out
DISPATCHES = ("drop_and_pad", "dropless")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, help="network (default: s on a GPU, tiny on a CPU)")
    parser.add_argument("--tokens", help=f"a micro-batch's (default: {TOKENS_ON_GPU}; on a CPU {TOKENS_ON_CPU})")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--no-step", action="store_true", help="leave the training step out")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the facts there too")
    args = parser.parse_args(argv)
    on_gpu = torch.cuda.is_available()
    size = args.size or ("s" if on_gpu else "tiny")
    if on_gpu and not TRITON_IS_INSTALLED:
        parser.error("triton is not installed: pip install 'mobilemoe-train[kernels]'")
    counts = _counts(parser, args.tokens or (TOKENS_ON_GPU if on_gpu else TOKENS_ON_CPU))
    if args.json:
        try:
            args.json.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            parser.error(f"--json {args.json}: {error.strerror}")

    begun = time.monotonic()
    facts = _where(size, on_gpu)
    if not on_gpu:
        print(heading(facts), file=sys.stderr)
    device, dtype = torch.device(facts["device_type"]), getattr(torch, facts["dtype"])
    facts["machine"] = {"bytes": copy_bandwidth(device), "flops": matmul_rate(device, dtype)}
    facts["kernels"], facts["train_steps"] = [], []
    for tokens in counts:
        for case in cases(SIZES[size], tokens, dtype, device):
            print(f"{tokens:,} tokens: {case.name} ...", file=sys.stderr, flush=True)
            spent = time.monotonic() - begun
            compiled = "left out (--no-compile)" if args.no_compile else ""
            if tokens != max(counts):
                compiled = f"measured with {max(counts):,} tokens only"
            elif spent > COMPILE_UNTIL:
                compiled = f"no time left after {spent:.0f} s"
            only = f"no time left after {spent:.0f} s" if spent > OTHERS_UNTIL else ""
            facts["kernels"].append({"tokens": tokens} | run_case(case, device, facts["machine"], compiled, only))
    if on_gpu:
        torch.cuda.empty_cache()
    for dispatch in () if args.no_step else DISPATCHES:
        print(f"training step, {dispatch} ...", file=sys.stderr, flush=True)
        facts["train_steps"].append({"dispatch": dispatch} | _step(size, dispatch, on_gpu))
    facts["seconds"] = time.monotonic() - begun
    if args.json:
        args.json.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(text(facts))
    bad = failures(facts)
    for line in bad:
        print(f"FAILED: {line}", file=sys.stderr)
    return 1 if bad else 0


def failures(facts: dict[str, Any]) -> list[str]:
    """What is wrong with kernels of ours; that somebody else's fails is no failure."""
    found = []
    for case in facts["kernels"]:
        for name, passes in case["passes"].items():
            ours, where = passes["ways"][OURS], f"{case['kernel']} {name}, {case['tokens']:,} tokens"
            if "absent" in ours:
                found.append(f"{where}: {ours['absent']}")
            elif not ours["right"]:
                found.append(f"{where}: error {ours['error']} is beyond {case['tolerance']}")
            elif not ours["repeats"]:
                found.append(f"{where}: two runs differ")
    return found


def _step(size: str, dispatch: str, on_gpu: bool) -> dict[str, Any]:
    if not on_gpu and size != "tiny":
        return {"absent": "needs a GPU"}
    return train_step(size, dispatch, on_gpu)


def _where(size: str, on_gpu: bool) -> dict[str, Any]:
    return {
        "size": size,
        "shape": SIZES[size]._asdict(),
        "on_gpu": on_gpu,
        "path": "triton" if on_gpu else "reference",
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "device_type": "cuda" if on_gpu else "cpu",
        "dtype": "bfloat16" if on_gpu else "float32",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "liger_kernel": _version("liger-kernel"),
        "python": sys.version.split()[0],
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "seconds": 0.0,
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _counts(parser: argparse.ArgumentParser, words: str) -> list[int]:
    try:
        counts = [int(word) for word in words.split(",")]
    except ValueError:
        counts = []
    if not counts or min(counts) < 1:
        parser.error(f"--tokens {words}: must be whole numbers of at least 1, with commas between")
    return counts


if __name__ == "__main__":
    sys.exit(main())
