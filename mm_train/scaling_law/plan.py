"""python -m mm_train.scaling_law plan: the network and the tokens that a budget buys, by the law."""

import argparse
import math
from pathlib import Path

from mm_train import config
from mm_train.cli import UserError
from mm_train.describe_plan import number
from mm_train.files import write_atomic, writing
from mm_train.rules import validate_model
from mm_train.scaling_law import plan_text, shapes, solve
from mm_train.scaling_law.devices import DEVICES, find_device
from mm_train.scaling_law.law import Law, load_law

EXAMPLES = """examples:
  python -m mm_train.scaling_law plan --memory-gib 5 --train-flops 3.3e20 --active-max 0.3e9 --device galaxy-s25
  python -m mm_train.scaling_law plan --memory-gib 1 --train-flops 1e22 --tokens-max 500B --out model.yaml
  python -m mm_train.scaling_law plan --coefficients runs/law/law.json --memory-gib 5 --train-flops 1e21 --figures plots
"""
NUMBERS = ("memory_gib", "train_flops", "active_max", "tokens_min", "tokens_max", "bandwidth", "flops")


def add_command(commands: argparse._SubParsersAction) -> None:
    """The subcommand `plan`."""
    parser = commands.add_parser(
        "plan",
        help="the best network within a budget",
        description="Solve the budget problem: the network, and for how many tokens to train it.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--memory-gib", required=True, metavar="GIB", help="for the int4 file and the int8 cache")
    parser.add_argument("--train-flops", required=True, metavar="X", help="6 N D, such as 3.3e20")
    parser.add_argument("--active-max", metavar="N", help="active parameters, such as 0.3e9 or 300M: speed on a device")
    parser.add_argument("--tokens-min", metavar="D", help="such as 100B")
    parser.add_argument("--tokens-max", metavar="D", help="such as 500B: what there is of data")
    parser.add_argument(
        "--coefficients", default="published", metavar="published | FILE.json", help="the law (published)"
    )
    parser.add_argument("--expansions", metavar="E,E,...", help="to choose from (default: those of the fit)")
    parser.add_argument("--context", type=int, default=8192, help="tokens in the cache (8192)")
    parser.add_argument("--vocab-size", type=int, default=shapes.VOCABULARY, help=f"({shapes.VOCABULARY})")
    parser.add_argument("--tolerance", type=float, help="loss that does not matter (default: RMSE of the law's fit)")
    parser.add_argument("--device", metavar="NAME", help=f"bounds for one of {', '.join(DEVICES)}")
    parser.add_argument("--bandwidth", metavar="B", help="bytes/s of a device of your own, such as 60e9")
    parser.add_argument("--flops", metavar="X", help="its operations/s, such as 500e9")
    parser.add_argument("--extrapolate", action="store_true", help="recommend outside of the fitted range as well")
    parser.add_argument("--out", type=Path, metavar="MODEL.yaml", help="write the network as a model file")
    parser.add_argument("--figures", type=Path, metavar="DIR", help="draw loss over N, and over D beyond the range")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Read, solve, say, write. Status 2 where the optimum leaves the fitted range and --extrapolate is not given."""
    values = {name: _positive(name, getattr(args, name)) for name in NUMBERS}
    law = load_law(args.coefficients)
    budget = _budget(args, values)
    expansions = _expansions(args.expansions, law)
    tolerance = law.rmse if args.tolerance is None else args.tolerance
    if not (math.isfinite(tolerance) and tolerance >= 0):
        raise UserError(f"--tolerance is {args.tolerance}; it must be 0 or above")
    device = find_device(args.device, values["bandwidth"], values["flops"])
    rows = solve.compare(law, solve.options(law, budget, expansions, args.vocab_size))
    best = solve.recommend(rows, tolerance)
    print(plan_text.budget(law, budget))
    print(plan_text.table(rows, best))
    left = solve.outside(law, best.option)
    if left:
        print(plan_text.warning(law, best.option, [row.option.expansion for row in rows], left))
    if args.figures:
        _draw(args.figures, law, budget, rows, best)
    if left and not args.extrapolate:
        raise UserError(
            f"the optimum is outside of the law's range ({left}): nothing is recommended. Stay inside"
            f" ({plan_text.inside(law, best.option)}), refit with larger runs, or give --extrapolate"
        )
    print(plan_text.recommendation(law, rows, best, tolerance, budget.context, device))
    if args.out:
        _write(args.out, law, best.option)
    return 0


def _positive(name: str, text: str | None) -> float | None:
    if text is None:
        return None
    flag = f"--{name.replace('_', '-')}"
    value = number(flag, text, thousand=1000, example="3e20 or 500B")
    if value <= 0:
        raise UserError(f"{flag} is {text}; it must be above 0")
    return value


def _budget(args: argparse.Namespace, values: dict[str, float | None]) -> solve.Budget:
    low, high = values["tokens_min"] or 0.0, values["tokens_max"] or math.inf
    if low > high:
        raise UserError(f"--tokens-min ({low:g}) exceeds --tokens-max ({high:g})")
    if args.context < 1:
        raise UserError(f"--context is {args.context}; it must be at least 1")
    if args.vocab_size < 1:
        raise UserError(f"--vocab-size is {args.vocab_size}; it must be at least 1")
    return solve.Budget(
        train_flops=values["train_flops"] or 0.0,
        memory=(values["memory_gib"] or 0.0) * solve.GIB,
        context=args.context,
        active_max=values["active_max"] or math.inf,
        tokens_min=low,
        tokens_max=high,
    )


def _expansions(text: str | None, law: Law) -> list[int]:
    if text is None:
        return list(law.expansions)
    try:
        chosen = sorted({int(word) for word in text.split(",")})
    except ValueError:
        chosen = [0]
    if chosen[0] < 1:
        raise UserError(f"--expansions is {text!r:.60}; it must be whole numbers from 1, such as 1,4,8")
    return chosen


def _draw(folder: Path, law: Law, budget: solve.Budget, rows: list[solve.Row], best: solve.Row) -> None:
    try:
        from mm_train.scaling_law.plan_figures import draw
    except ImportError as error:
        raise UserError(f"figures need {error.name}: pip install 'mobilemoe-train[law]'") from None
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        names = draw(folder, law, budget, rows, best)
    print(f"figures in {folder}: {', '.join(names)}")


def _write(path: Path, law: Law, option: solve.Option) -> None:
    """The model file, and the proof that it loads as what was planned."""
    comment = (
        f"{option.total:,} parameters, {option.active:,} active per token, int4 file {option.int4_bytes:,} bytes.\n"
        f"Planned with mm_train.scaling_law ({law.source}) for {option.tokens:.4g} tokens: loss {option.loss:.4f}."
    )
    with writing(path.parent):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, shapes.yaml(option.model, comment).encode())
    loaded = config.load([path], check=lambda cfg: validate_model(cfg.model)).model
    if loaded != option.model:
        raise RuntimeError(f"{path} does not load as it was planned: {config.model_difference(loaded, option.model)}")
    print(f"written: {path} (python -m mm_train.describe {path} --tokens {option.tokens})")
