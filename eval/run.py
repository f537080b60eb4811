"""Evaluates a model on benchmarks: python -m eval.run --tasks all --model DIR_OR_RUN [--limit N].

Writes results.json and results.md and prints a table. Every benchmark that was asked for is in them, with a status:
ok, missing (its data is not in the mirror) or "not run" (this version cannot score it). Never uses the network.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval import table
from eval.mirror import Mirror, MissingDataError
from eval.suite import Benchmark, load_suites, select
from mm_train.cli import UserError, command
from mm_train.files import write_atomic

RUNNABLE = "multiple_choice"  # the kind of benchmark that this version can score
CPU_BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 32768  # a batch that stays in the cache is the faster one on a CPU
INCOMPLETE = 3  # exit status: a benchmark that this version can run was missing

EPILOG = """examples:
  python -m eval.prepare_data                                                   # once: the data
  python -m eval.run --tasks all --model runs/quickstart/int4 --limit 50
  python -m eval.run --tasks hellaswag,mmlu --model runs/quickstart/pretrain
  python -m eval.run --list

--limit N takes the first N items of a benchmark; of MMLU, N in all, dealt round robin over its 57 subjects.
Results that --out already holds are kept when model, data, settings and code are the same: an evaluation that
was interrupted goes on with the first unfinished benchmark.
exit status: 0 all done ("not run" counts as done), 2 bad input, 3 data of a requested benchmark is missing.
"""


def status_of(benchmark: Benchmark, mirror: Mirror) -> tuple[str, str]:
    """("ok" | "missing" | "not run", reason) as far as it can be told without running."""
    if not mirror.count(benchmark.dataset):
        return "missing", _missing(benchmark, mirror, f"no items of {benchmark.dataset.path}")
    if benchmark.kind != RUNNABLE:
        return "not run", "scoring generated answers is not in this version"
    return "ok", ""


def _missing(benchmark: Benchmark, mirror: Mirror, what: str) -> str:
    remedy = benchmark.note or f"python -m eval.prepare_data --out {mirror.folder}"
    return f"{what} in {mirror.folder} ({remedy})"


def print_list(benchmarks: list[Benchmark], mirror: Mirror) -> None:
    """What could be run, and whether the data is there."""
    for benchmark in benchmarks:
        status, reason = status_of(benchmark, mirror)
        status = f"{status}: {reason}" if reason else "ready"
        verified = "" if benchmark.verified else "?"
        print(
            f"{benchmark.name:<14} {benchmark.task:<16} {benchmark.shots}{verified}-shot  {benchmark.metric:<12} "
            f"{mirror.count(benchmark.dataset):>6} items  {status}"
        )
    print("?: number of shots not verified against the paper")


def load(path: Path, batch_tokens: int | None) -> Any:
    """The model (a release, run or checkpoint folder) behind eval.lm's interface: bfloat16 on a GPU, else float32."""
    import torch

    from eval.lm import MobileMoELM
    from mm_train.model_folder import find_tokenizer, load_model
    from mm_train.tokenizer import load_tokenizer

    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    batch_tokens = batch_tokens or (GPU_BATCH_TOKENS if on_gpu else CPU_BATCH_TOKENS)
    tokenizer = load_tokenizer(find_tokenizer(path))
    return MobileMoELM(load_model(path, dtype, device).eval(), tokenizer, batch_tokens=batch_tokens, device=device)


def format_of(path: Path) -> str:
    """What the folder holds: "int4" or "bf16" (releases), or "run" (training checkpoints)."""
    config = path / "config.json"
    if not config.is_file():
        return "run"
    return "int4" if "quantization" in json.loads(config.read_text(encoding="utf-8")) else "bf16"


def weights_sha256(model: Any) -> str:
    """Hash of all weights, so that a result is never taken for that of another model."""
    import torch

    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def evaluate(
    benchmarks: list[Benchmark], mirror: Mirror, lm: Any, model: Path, limit: int | None, finished: Path
) -> dict[str, Any]:
    """The "tasks" of results.json. Each finished benchmark is kept in `finished`, for a later call with equal input."""
    from eval.score import score

    # The path is among them because a run's folder also says whether its weights are to be fake-quantised.
    same = [str(model.resolve()), weights_sha256(lm.model), lm.tokenizer.sha256, str(lm.device)]
    same += [code_sha256(), versions(), mirror.sha256, limit]
    tasks = {}
    for benchmark in benchmarks:
        status, reason = status_of(benchmark, mirror)
        tasks[benchmark.name] = entry = {
            "status": status,
            "reason": reason,
            "metric": benchmark.metric,
            "shots": benchmark.shots,
            "score": None,
            "stderr": None,
            "n": 0,
            "n_total": mirror.count(benchmark.dataset),
            "chance": None,
            "bits_per_byte": None,
        }
        if status != "ok":
            continue
        key = hashlib.sha256(json.dumps([*same, asdict(benchmark)]).encode()).hexdigest()
        file = finished / f"{benchmark.name}-{key[:16]}.json"
        if not file.is_file():
            try:
                result = score(benchmark, mirror, lm, limit)
            except MissingDataError as error:
                entry |= {"status": "missing", "reason": _missing(benchmark, mirror, str(error))}
                continue
            write_atomic(file, json.dumps(asdict(result)).encode())
        result = json.loads(file.read_bytes())
        if cut := result.pop("num_truncated"):
            context = lm.model.config.max_position_embeddings
            entry["reason"] = f"{cut} requests (prompt + choice) cut on the left to {context} tokens"
        entry |= result
    return tasks


def code_sha256() -> str:
    """Hash of the project's own code, so that results do not outlive the repair of a fault."""
    root = Path(__file__).parent.parent
    files = sorted(file for folder in ("eval", "kernels", "mm_train") for file in (root / folder).glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def versions() -> dict[str, str]:
    """Installed versions of what a score depends on."""
    return {name: importlib.metadata.version(name) for name in ("lm-eval", "datasets", "tokenizers", "torch")}


def run(
    benchmarks: list[Benchmark], mirror: Mirror, model: Path, out: Path, limit: int | None, batch_tokens: int | None
) -> dict[str, Any]:
    """All of results.json; `out` must exist."""
    from eval.score import offline

    started = time.monotonic()
    offline()
    finished = out / "finished"
    finished.mkdir(exist_ok=True)
    tasks = evaluate(benchmarks, mirror, load(model, batch_tokens), model, limit, finished)
    scores = [task["score"] for task in tasks.values() if task["status"] == "ok"]
    return {
        "model": str(model),
        "format": format_of(model),
        "limit": limit,
        "tasks": tasks,
        "average": sum(scores) / len(scores) if scores else None,
        "seconds": round(time.monotonic() - started, 1),
        "versions": {**versions(), "data": mirror.sha256},
    }


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", type=Path, metavar="DIR", help="release folder, run folder or checkpoint folder")
    parser.add_argument("--tasks", default="all", help="all, a suite (paper14) or names with commas (default: all)")
    parser.add_argument("--limit", type=positive, metavar="N", help="items per benchmark (default: all)")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: MODEL-eval beside the model)"
    )
    parser.add_argument("--data", type=Path, default=Path("data/eval"), help="mirror folder (default: data/eval)")
    parser.add_argument(
        "--batch-tokens",
        type=positive,
        metavar="N",
        help=f"most tokens in a batch (default: {CPU_BATCH_TOKENS} on a CPU, {GPU_BATCH_TOKENS} on a GPU)",
    )
    parser.add_argument("--list", action="store_true", help="show the benchmarks and whether their data is there")
    args = parser.parse_args(argv)

    suites = load_suites()
    benchmarks = select(suites, args.tasks)
    published = {name: scores["average"] for suite in suites.values() for name, scores in suite.published.items()}
    mirror = Mirror(args.data)
    if args.list:
        print_list(benchmarks, mirror)
        return 0
    if args.model is None:
        raise UserError("--model is needed: the folder of a release, a run or a checkpoint")
    if not args.model.is_dir():
        raise UserError(f"--model {args.model}: no such folder")
    # Before torch is loaded: spinning threads made an evaluation 4 times slower on 2 cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    out = args.out or args.model.resolve().with_name(args.model.resolve().name + "-eval")
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = run(benchmarks, mirror, args.model, out, args.limit, args.batch_tokens)
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(out / "results.md", table.markdown(results, published).encode())
    except OSError as error:
        raise UserError(f"evaluation into {out} stopped: {error}") from None
    print(table.terminal(results, published))
    print(f"results: {out / 'results.json'}")
    can_run = {benchmark.name for benchmark in benchmarks if benchmark.kind == RUNNABLE}
    incomplete = any(task["status"] == "missing" for name, task in results["tasks"].items() if name in can_run)
    return INCOMPLETE if incomplete else 0


if __name__ == "__main__":
    sys.exit(main())
