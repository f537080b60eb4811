"""Tokens through the model and seconds, beside lm-eval's own Hugging Face path on the same weights and items.

    python -m eval.bench --model RELEASE
    python -m eval.bench --model RELEASE --tasks mmlu --items 14042 --count

Items are the first of each benchmark, part by part, so that few-shot prompts are shared as in a complete evaluation.
Both sides run one after the other, benchmark by benchmark; every answer is compared as well (eval.verify). With --count
neither model computes anything, so that the tokens of complete multiple-choice benchmarks are known in minutes.
"""

import sys
from pathlib import Path
from typing import Any

from eval.mirror import Mirror, MissingDataError
from eval.suite import load_suites, select
from eval.verify import HEADER, arguments, both, compare, line
from mm_train.cli import UserError, command

TASKS = "hellaswag,arc_challenge,mmlu,boolq,gsm8k"


def compute_nothing(lm: Any, theirs: Any) -> None:
    """Let both sides ask their models as ever, and take zeros for what comes of it."""
    from eval.packed import PackedEngine

    if not isinstance(lm.engine, PackedEngine):
        raise UserError("--count is for models of this project")
    network = lm.engine.model

    def zeros(tokens_BT: Any, cache: Any = None) -> Any:
        return tokens_BT.new_zeros((*tokens_BT.shape, network.config.hidden_size), dtype=network.compute_dtype)

    network.hidden = zeros  # type: ignore[method-assign]
    theirs.computes = False


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = arguments("python -m eval.bench", __doc__, TASKS, 100)
    parser.add_argument("--model", type=Path, required=True, help="a release folder, or a Hugging Face folder")
    parser.add_argument("--count", action="store_true", help="count tokens only, of multiple-choice benchmarks")
    args = parser.parse_args(argv)
    benchmarks = [b for b in select(load_suites(), args.tasks) if b.kind != "code"]
    if args.count:
        benchmarks = [b for b in benchmarks if b.kind == "multiple_choice"]
    lm, theirs = both(args)
    if args.count:
        compute_nothing(lm, theirs)
    mirror, found = Mirror(args.data), []
    print(HEADER)
    for benchmark in benchmarks:
        try:
            found.append(compare(benchmark, mirror, lm, theirs, args.items, args.max_new, dealt=False))
        except MissingDataError as error:
            print(f"{benchmark.name:<14} missing: {error}", flush=True)
            continue
        print(line(benchmark.name, found[-1]), flush=True)
    tokens = [sum(c.our_tokens for c in found), sum(c.their_tokens for c in found)]
    seconds = [sum(c.our_seconds for c in found), sum(c.their_seconds for c in found)]
    if found:
        print(
            f"all: {tokens[0]:,} tokens against {tokens[1]:,}, {tokens[1] / tokens[0]:.1f} times fewer; "
            f"{seconds[0]:.1f} s against {seconds[1]:.1f} s, {seconds[1] / seconds[0]:.1f} times faster"
        )
    return 0 if all(c.equal for c in found) else 1


if __name__ == "__main__":
    sys.exit(main())
