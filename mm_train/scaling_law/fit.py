"""python -m mm_train.scaling_law fit RUNS.csv: the law of a table of trained networks, as JSON, text and figures."""

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from mm_train.cli import UserError
from mm_train.files import write_atomic, writing
from mm_train.scaling_law.forms import FIXED, JOINT, Form, features, predict, require, why_not
from mm_train.scaling_law.law import SCHEMA, Array, Law, law_to_json
from mm_train.scaling_law.runs import Runs, read_runs

FORMS = {  # --form -> the law that is fitted to each group, and the column that makes the groups
    "joint": (JOINT, None),
    "fixed-e": (FIXED, "expansion"),
    "granularity": (FIXED, "granularity"),
    "shared": (FIXED, "shared"),
}
X = ("granularity", "shared")  # choices that equation (1) leaves alone
EXAMPLES = """examples:
  python -m mm_train.scaling_law fit runs.csv --out runs/law
  python -m mm_train.scaling_law fit runs.csv --unit 1e6 --granularity 8 --shared 1
  python -m mm_train.scaling_law fit runs.csv --form granularity --expansion 8 --c 1.973
"""


class Fitted(NamedTuple):
    """The law of one group of runs, and how sure it is."""

    label: str
    form: Form
    runs: Runs
    law: Law
    facts: dict[str, Any]  # for the JSON


def add_command(commands: argparse._SubParsersAction) -> None:
    """The subcommand `fit`."""
    parser = commands.add_parser(
        "fit",
        help="fit the law to a table of runs",
        description="Fit equation (1), or a reduced form of it, to the held-out losses of trained networks.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("runs", type=Path, metavar="RUNS.csv", help="a line for each network (scaling_law sweep)")
    parser.add_argument("--out", type=Path, default=Path("runs/law"), help="folder for law.json and figures (runs/law)")
    parser.add_argument("--form", choices=FORMS, default="joint", help="joint: equation (1); the others: A N^α + B D^β"
                        " + c for each expansion, granularity, or with and without shared expert")  # fmt: skip
    parser.add_argument("--unit", type=float, default=1e9, help="N and D enter divided by it (1e9; 1e6 for small runs)")
    parser.add_argument("--expansion", type=float, help="take the runs of this expansion only")
    parser.add_argument("--granularity", type=int, help="take the runs of this granularity, and the dense ones")
    parser.add_argument("--shared", type=int, choices=(0, 1), help="likewise with (1) or without (0) a shared expert")
    parser.add_argument("--c", type=float, help="hold c near this value, as the paper does for granularity and shared")
    parser.add_argument("--c-within", type=float, default=0.01, help="so near, as a share of it (0.01)")
    parser.add_argument("--e-max", type=float, default=32.0, help="where Ê saturates (32)")
    parser.add_argument("--huber", type=float, default=3e-3, help="residual of log L that counts linearly (3e-3)")
    parser.add_argument(
        "--bootstrap", type=int, default=200, metavar="N", help="draws for the intervals (200; 0: none)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (0)")
    parser.set_defaults(func=run)


def run(args: argparse.Namespace) -> int:
    """Read, fit, say, write."""
    try:
        from mm_train.scaling_law.estimate import Options
        from mm_train.scaling_law.figures import draw
        from mm_train.scaling_law.fit_text import text
    except ImportError as error:
        raise UserError(f"fitting needs {error.name}: pip install 'mobilemoe-train[law]'") from None
    for name in ("unit", "huber", "e_max", "c", "c_within"):
        value = getattr(args, name)
        if value is not None and not (math.isfinite(value) and value > 0):
            raise UserError(f"--{name.replace('_', '-')} is {value}; it must be a number above 0")
    if args.e_max <= 1:
        raise UserError(f"--e-max is {args.e_max}; it must be above 1, the expansion of a dense network")
    if args.bootstrap < 0 or args.seed < 0:
        raise UserError(f"--bootstrap ({args.bootstrap}) and --seed ({args.seed}) must not be negative")
    if args.form in X and args.c is None:
        raise UserError(f"--form {args.form} fits with c held near the joint fit's: give --c (published: 1.973)")
    options = Options(args.unit, args.e_max, args.huber, args.c, args.c_within)
    form, _ = FORMS[args.form]
    groups, left = _enough(args, form, dict(_groups(args, _chosen(args, read_runs(args.runs)))))
    steps = sum(args.bootstrap + 1 + _scales(runs) for runs in groups.values())
    with tqdm(total=steps, desc="fit", unit="fit", disable=None, leave=False) as bar:
        fits = [_fit(label, form, runs, options, args, bar) for label, runs in groups.items()]
    for line in left:
        print(line)
    print(text(fits))
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        values = {"schema": SCHEMA, "form": args.form, "fits": [law_to_json(f.law) | f.facts for f in fits]}
        write_atomic(args.out / "law.json", (json.dumps(values, indent=1) + "\n").encode())
        names = draw(fits, args.out)
    print(f"written to {args.out}: law.json, {', '.join(names)}")
    return 0


def _scales(runs: Runs) -> int:
    from mm_train.scaling_law.uncertainty import scales_to_leave_out

    return len(scales_to_leave_out(runs))


def _chosen(args: argparse.Namespace, runs: Runs) -> Runs:
    """The runs that the flags choose. Granularity and shared expert do not concern dense networks."""
    for name in ("expansion", *X):
        wanted = getattr(args, name)
        if wanted is None:
            continue
        column, concerned = getattr(runs, name), runs.sparse if name in X else runs
        if wanted not in concerned.values(name):
            found = ", ".join(f"{value:g}" for value in concerned.values(name)) or "none"
            raise UserError(f"{args.runs} has no run with {name} {wanted:g}; it has {found}")
        runs = runs.where((column == wanted) | ((runs.expansion == 1) & (name in X)))
    return runs


def _groups(args: argparse.Namespace, runs: Runs) -> Iterator[tuple[str, Runs]]:
    """(label, runs) of each law. Raises UserError when a group mixes what the law does not tell apart."""
    _, column = FORMS[args.form]
    if column in X:
        runs = runs.sparse
    parts = {"joint": runs}
    if column:
        parts = {f"{column} {value:g}": runs.where(getattr(runs, column) == value) for value in runs.values(column)}
    for label, part in parts.items():
        fixed = [name for name in ("expansion", *X) if name != column]
        for name in fixed[column is None :]:  # the joint law tells expansions apart
            found = part.sparse.values(name)
            if len(found) > 1:
                raise UserError(
                    f"{label}: the runs mix {name} {', '.join(f'{value:g}' for value in found)}, which the law does not"
                    f" tell apart; choose one: --{name} {found[-1]:g}"
                )
        yield label, part


def _enough(args: argparse.Namespace, form: Form, groups: dict[str, Runs]) -> tuple[dict[str, Runs], list[str]]:
    """Groups that determine the form, and a line for each that does not. Raises UserError when none does."""
    held = args.c is not None
    lacks = {label: why_not(form, runs, held) for label, runs in groups.items()}
    if not groups:
        raise UserError(f"{args.runs} has no runs with experts (expansion above 1)")
    if all(lacks.values()):
        label = next(iter(groups))
        require(form, groups[label], held, f"the form {args.form} ({label})" if len(groups) > 1 else args.form)
    kept = {label: runs for label, runs in groups.items() if not lacks[label]}
    return kept, [f"{label}: left out, {lack}" for label, lack in lacks.items() if lack]


def _fit(label: str, form: Form, runs: Runs, options: Any, args: argparse.Namespace, bar: tqdm) -> Fitted:
    from mm_train.scaling_law import estimate, uncertainty

    bar.set_postfix_str(label)
    task = estimate.problem(form, runs, options)
    best = estimate.fit(task)
    bar.update()
    draws = uncertainty.bootstrap(task, best, args.bootstrap, args.seed, bar.update)
    left_out = []
    for column, value in uncertainty.scales_to_leave_out(runs):
        left_out.append(uncertainty.leave_one_out(form, runs, options, column, value)._asdict())
        bar.update()
    sparse = runs.sparse if len(runs.sparse) else runs
    error = uncertainty.rmse(np.exp(predict(form, task.terms, best.theta)), runs.loss)
    law = Law(
        form.coefficients(best.theta),
        unit=options.unit,
        active_params=(float(runs.active_params.min()), float(runs.active_params.max())),
        tokens=(float(runs.tokens.min()), float(runs.tokens.max())),
        expansions=tuple(round(value) for value in runs.values("expansion")),
        granularity=int(sparse.granularity[0]),
        shared=bool(sparse.shared[0]),
        rmse=max(error, 1e-9),
        source=f"fit of {len(runs)} runs of {args.runs.name}",
        e_max=options.e_max,
        draws=tuple(form.coefficients(draw) for draw in draws),
    )
    facts = {
        "label": label,
        "runs": len(runs),
        "huber": options.huber,
        "c_held_near": options.c,
        "objective": best.objective,
        "starts": best.starts,
        "finalists_agreeing": [best.agreeing, best.finalists],
        "leave_one_out": left_out,
        "intervals": {},
    }
    if args.bootstrap > 1:
        facts |= _sureness(form, runs, law, draws, options)
    return Fitted(label, form, runs, law, facts)


def _sureness(form: Form, runs: Runs, law: Law, draws: Array, options: Any) -> dict[str, Any]:
    """What the bootstrap tells."""
    from mm_train.scaling_law import uncertainty

    low, high = uncertainty.interval(np.array(law.draws))
    names = law.coefficients._fields
    terms = features(form, runs, options.unit, options.e_max)
    said = np.exp([predict(form, terms, draw) for draw in draws])
    below, above = uncertainty.interval(said)
    share, loadings = uncertainty.principal_direction(draws, form.names)
    return {
        "intervals": {
            name: [float(a), float(b)] for name, a, b in zip(names, low, high, strict=True) if name in form.names
        },
        "prediction_interval_half_width_max": float((above - below).max() / 2),
        "move_together": uncertainty.correlations(draws, form.names),
        "principal_direction": {"share": share, "loadings": loadings},
    }
