"""Evaluates a model on benchmarks: python -m eval.run --tasks all --model DIR_OR_RUN [--limit N].

Writes results.json, results.md and results.html, and prints a table; of a mixture of experts also which of them each
benchmark uses: experts.json, experts.svg. Every benchmark that was asked for is in them,
with a status: ok, missing (its data is not in the mirror) or "not run" (and why). Never uses the network.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from eval import expert_use, table
from eval.mirror import Mirror
from eval.suite import Benchmark, load_suites, select
from mm_train.cli import UserError, command
from mm_train.files import write_atomic

INCOMPLETE = 3  # exit status: a benchmark that was asked for did not run, or not on its complete set

EPILOG = """examples:
  python -m eval.prepare_data                                             # once: the data
  python -m eval.run --tasks paper14 --model runs/quickstart/export --limit 50
  python -m eval.run --tasks "hellaswag,mmlu|reading"                     # the newest finished run below runs/
  python -m eval.run --tasks early --model hf:FOLDER                      # any causal model of transformers
  python -m eval.run --tasks early --model FILE.gguf                      # or its folder: as a device computes it
  launch/local.sh 8 -m eval.run --tasks all --model FOLDER                # on eight GPUs
  python -m eval.run --list

--limit N takes the first N items of a benchmark; of MMLU and BBH, N in all, dealt round robin over their parts.
Answers are kept in OUT/answers as they come, by model and request: an evaluation that was interrupted goes on where it
was, on any number of processes, and one with a larger limit or more tasks computes only what is new.
exit status: 0 all done, 2 bad input, 3 something that was asked for is missing, did not run, or has a part of its items
(with --limit a part is what was asked for).
"""


def print_list(benchmarks: list[Benchmark], mirror: Mirror) -> None:
    """What could be run, and whether the data is there."""
    from eval.results import status_of

    for benchmark in benchmarks:
        status, reason = status_of(benchmark, mirror)
        count = mirror.count(benchmark.dataset)
        subset = "" if count >= benchmark.items else f", {count} of {benchmark.items} items"
        state = f"{status}: {reason}" if reason else f"ready{subset}"
        verified = "" if benchmark.verified else "?"
        print(
            f"{benchmark.name:<14} {benchmark.group:<13} {benchmark.task:<17} v{benchmark.version}  "
            f"{benchmark.shots}{verified}-shot  {benchmark.metric:<23}  {count:>6} items  {state}"
        )
    print("?: number of shots not verified against the paper")


def run(args: argparse.Namespace, benchmarks: list[Benchmark], mirror: Mirror, out: Path) -> dict[str, Any] | None:
    """All of results.json; None on ranks that do not write it. `out` must exist."""
    from eval.item_log import ItemLog
    from eval.lm import LM
    from eval.models import open_model
    from eval.packed import PackedEngine
    from eval.ranks import Ranks
    from eval.results import averages, evaluate, versions
    from eval.tasks import offline

    started = time.monotonic()
    offline()
    ranks = Ranks()
    subject = open_model(args.model, args.batch_tokens, ranks.device())
    log = ItemLog(out / "answers" / subject.key[:16], ranks.rank)
    items = out / "items"
    items.mkdir(exist_ok=True)
    lm, engine = LM(subject.engine, log, ranks), subject.engine
    if isinstance(engine, PackedEngine):
        engine.count_experts()
    tasks = evaluate(benchmarks, mirror, lm, args.limit, args.allow_code_execution, items if ranks.is_main else None)
    work = ranks.gather((subject.engine.work.tokens, subject.engine.work.padding))
    used = lm.used()
    ranks.close()
    log.close()
    if not ranks.is_main:
        return None
    experts_per_token = engine.model.config.num_experts_per_tok if isinstance(engine, PackedEngine) else 0
    expert_use.write(out, expert_use.facts(used, lm.asked, args.model, experts_per_token))
    return {
        "model": args.model,
        "format": subject.facts["format"],
        "facts": subject.facts,
        "limit": args.limit,
        "suite": suite_of(benchmarks),
        "tasks": tasks,
        **averages(tasks),
        "seconds": round(time.monotonic() - started, 1),
        "tokens": sum(tokens for tokens, _ in work),
        "padding": sum(padding for _, padding in work),
        "ranks": ranks.world,
        "versions": {**versions(), "data": mirror.sha256},
    }


def suite_of(benchmarks: list[Benchmark]) -> str | None:
    """The suite that these benchmarks are, whole."""
    names = {benchmark.name for benchmark in benchmarks}
    return next((s.name for s in load_suites().values() if {b.name for b in s.benchmarks} == names), None)


def positive(text: str) -> int:
    """argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not at least 1")
    return value


def parser() -> argparse.ArgumentParser:
    """The options of this command."""
    found = argparse.ArgumentParser(
        prog="python -m eval.run",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    found.add_argument(
        "--model",
        metavar="DIR",
        help="release, run or checkpoint folder, .gguf file or folder, or hf:FOLDER (default: the newest finished run"
        " below runs/)",
    )
    found.add_argument(
        "--tasks", default="all", help="all, suites (paper14, advanced, early), groups or names, with commas or bars"
    )
    found.add_argument("--limit", type=positive, metavar="N", help="items per benchmark (default: all)")
    found.add_argument(
        "--out", type=Path, metavar="DIR", help="where results go (default: MODEL-eval beside the model)"
    )
    found.add_argument("--data", type=Path, default=Path("data/eval"), help="mirror folder (default: data/eval)")
    found.add_argument(
        "--batch-tokens", type=positive, metavar="N", help="most tokens in a batch (default: 2048 on a CPU, else 32768)"
    )
    found.add_argument(
        "--allow-code-execution", action="store_true", help="run the programs that HumanEval and MBPP ask for (sandbox)"
    )
    found.add_argument("--list", action="store_true", help="show the benchmarks and whether their data is there")
    return found


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    args = parser().parse_args(argv)
    suites = load_suites()
    benchmarks = select(suites, args.tasks)
    mirror = Mirror(args.data)
    if args.list:
        print_list(benchmarks, mirror)
        return 0
    # Before torch is loaded: spinning threads made an evaluation 4 times slower on 2 cores that others use too.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    from eval.models import folder_of, newest_run

    if args.model is None:
        args.model = str(newest_run(Path("runs")))
        print(f"the newest finished run: {args.model}", flush=True)
    folder = folder_of(args.model).resolve()
    out = args.out or folder.with_name((folder.stem if folder.is_file() else folder.name) + "-eval")
    published = suites["paper14"].published
    try:
        out.mkdir(parents=True, exist_ok=True)
        results = run(args, benchmarks, mirror, out)
        if results is None:
            return 0
        write_atomic(out / "results.json", (json.dumps(results, indent=1) + "\n").encode())
        write_atomic(out / "results.md", table.markdown(results, published).encode())
        write_atomic(out / "results.html", table.page(results, published, expert_use.section(out)).encode())
    except OSError as error:
        raise UserError(f"evaluation into {out} stopped: {error}") from None
    print(table.terminal(results, published))
    print(f"results: {out / 'results.json'}")
    if (out / expert_use.FACTS).is_file():
        print(f"which benchmark uses which experts: {out / expert_use.FACTS}, {out / expert_use.FIGURE}")
    done = (t["status"] == "ok" and (t["complete"] or args.limit is not None) for t in results["tasks"].values())
    return 0 if all(done) else INCOMPLETE


if __name__ == "__main__":
    sys.exit(main())
