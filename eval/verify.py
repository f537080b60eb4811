"""Asks the same of this project's engine and of lm-eval's own Hugging Face path, and compares every answer.

    python -m eval.verify --model RELEASE --items 100

Log-likelihoods have to agree within 1e-3 nats, greedy flags, written texts and scores exactly. Exit status 1 when they
do not.
"""

import argparse
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.mirror import Mirror, MissingDataError
from eval.run import positive
from eval.suite import Benchmark, load_suites, select
from mm_train.cli import UserError, command

TOLERANCE = 1e-3  # nats


@dataclass
class Comparison:
    """How far both paths agree on a benchmark. `ours` and `theirs` are scores."""

    items: int
    requests: int
    largest: float  # difference of log-likelihoods, nats
    greedy: int  # flags that differ
    texts: int  # texts that differ
    ours: float
    theirs: float
    scores: int  # items whose score differs
    our_tokens: int
    their_tokens: int
    our_seconds: float
    their_seconds: float
    note: str = ""  # in what both were asked less than the benchmark asks

    @property
    def equal(self) -> bool:
        """Within the tolerance everywhere."""
        return self.largest <= TOLERANCE and not (self.greedy or self.texts or self.scores)


def compare(
    benchmark: Benchmark,
    mirror: Mirror,
    lm: Any,
    theirs: Any,
    items: int,
    max_new: int | None = None,
    dealt: bool = True,
) -> Comparison:
    """Run `items` items of a benchmark both ways. `max_new`: fewer tokens to write than the benchmark asks for."""
    from eval.sequences import MAX_NEW_TOKENS
    from eval.tasks import build, judge

    questions = build(benchmark, mirror, items, dealt)
    requests = [request for item in questions.items for request in item.requests]
    longest = 0  # text to write that is asked for in vain
    for request in requests:
        if request.request_type == "generate_until":
            asked = int(request.args[1].get("max_gen_toks", MAX_NEW_TOKENS))
            wanted = asked if max_new is None else min(asked, max_new)
            if wanted >= lm.engine.context:  # lm-eval refuses to run: what this project's engine makes of it, for both
                longest, wanted = asked, lm.engine.context // 2
            request.arguments = (request.args[0], {**request.args[1], "max_gen_toks": wanted})
    numbered = [(number, request) for number, item in enumerate(questions.items) for request in item.requests]
    before, started = lm.engine.work.tokens + lm.engine.work.padding, time.perf_counter()
    ours = lm.answer(numbered, benchmark.name).answers
    our_seconds = time.perf_counter() - started
    our_tokens = lm.engine.work.tokens + lm.engine.work.padding - before
    before, started = theirs.tokens, time.perf_counter()
    expected = theirs.answer(requests)
    their_seconds = time.perf_counter() - started
    scores = [[values[benchmark.key] for values in judge(questions, answers)] for answers in (ours, expected)]
    pairs = list(zip(ours, expected, strict=True))
    scored = [(a, b) for a, b in pairs if not isinstance(a, str)]
    return Comparison(
        items=len(questions.items),
        requests=len(requests),
        largest=max((abs(a[0] - b[0]) for a, b in scored), default=0.0),
        greedy=sum(a[1] != b[1] for a, b in scored),
        texts=sum(a != b for a, b in pairs if isinstance(a, str)),
        ours=sum(scores[0]) / len(scores[0]),
        theirs=sum(scores[1]) / len(scores[1]),
        scores=sum(a != b for a, b in zip(*scores, strict=True)),
        our_tokens=our_tokens,
        their_tokens=theirs.tokens - before,
        our_seconds=our_seconds,
        their_seconds=their_seconds,
        note=f"of {longest} tokens to write {lm.engine.context // 2}, for want of context" if longest else "",
    )


NAMES = (
    *("benchmark", "items", "requests", "ours", "theirs", "largest difference", "greedy", "texts", "scores"),
    *("tokens ours", "theirs", "ratio", "s ours", "theirs", "ratio"),
)
WIDTHS = (13, 5, 8, 7, 7, 18, 6, 5, 6, 11, 10, 6, 7, 7, 6)
HEADER = "  ".join(f"{name:>{width}}" for name, width in zip(NAMES, WIDTHS, strict=True))


def line(name: str, c: Comparison) -> str:
    """A row of the table."""
    cells = [name, str(c.items), str(c.requests), f"{c.ours:.4f}", f"{c.theirs:.4f}", f"{c.largest:.1e}"]
    cells += [str(c.greedy), str(c.texts), str(c.scores), str(c.our_tokens), str(c.their_tokens)]
    cells += [f"{c.their_tokens / max(1, c.our_tokens):.1f}", f"{c.our_seconds:.1f}", f"{c.their_seconds:.1f}"]
    cells.append(f"{c.their_seconds / c.our_seconds:.1f}")
    row = "  ".join(f"{cell:>{width}}" for cell, width in zip(cells, WIDTHS, strict=True))
    return "  ".join(filter(None, [row, "" if c.equal else "DIFFERENT", c.note]))


def arguments(prog: str, description: str | None, tasks: str, items: int) -> argparse.ArgumentParser:
    """The options that this command and eval.bench share."""
    parser = argparse.ArgumentParser(
        prog=prog, description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hf", action="store_true", help="run our side through transformers, too (as hf:MODEL)")
    parser.add_argument("--tasks", default=tasks, help="as for eval.run (default: %(default)s)")
    parser.add_argument("--items", type=positive, default=items, help="of each benchmark (default: %(default)s)")
    parser.add_argument("--max-new", type=positive, help="fewer tokens to write than the benchmarks ask for")
    parser.add_argument("--batch-tokens", type=positive, help="most tokens in a batch of ours")
    parser.add_argument("--batch-size", type=positive, default=16, help="rows in a batch of theirs (default: 16)")
    parser.add_argument("--row-a-choice", action="store_true", help="theirs without its cache for one-token choices")
    parser.add_argument("--data", type=Path, default=Path("data/eval"), help="mirror folder (default: data/eval)")
    return parser


def both(args: argparse.Namespace) -> tuple[Any, Any]:
    """Our side and theirs, on the same weights."""
    import torch

    from eval.lm import LM
    from eval.lm_eval_path import TheirPath
    from eval.models import HUGGING_FACE, format_of, open_model
    from eval.tasks import offline

    offline()
    if not (args.model / "config.json").is_file():
        raise UserError(f"--model {args.model}: give a release, which transformers can load too (mm_train.export)")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    spec = f"{HUGGING_FACE}{args.model}" if args.hf else str(args.model)
    subject = open_model(spec, args.batch_tokens, device)
    facts = subject.facts
    print(
        f"{args.model} ({format_of(spec)}): {facts['parameters']:,} parameters, {facts['dtype']} on {device}",
        flush=True,
    )
    return LM(subject.engine), TheirPath(args.model, args.batch_size, device, not args.row_a_choice)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = arguments("python -m eval.verify", __doc__, "paper14", 100)
    parser.add_argument("--model", type=Path, required=True, help="a release folder, or a Hugging Face folder")
    args = parser.parse_args(argv)
    benchmarks = [b for b in select(load_suites(), args.tasks) if b.kind != "code"]
    lm, theirs = both(args)
    mirror, failed = Mirror(args.data), 0
    print(HEADER)
    for benchmark in benchmarks:
        try:
            found = compare(benchmark, mirror, lm, theirs, args.items, args.max_new)
        except MissingDataError as error:
            print(f"{benchmark.name:<14} missing: {error}", flush=True)
            continue
        print(line(benchmark.name, found), flush=True)
        failed += not found.equal
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
