"""Compares two evaluations item by item: python -m eval.compare A B, the --out folders of two eval.run.

Both have answered the same items, so differences are judged in pairs: for right and wrong by McNemar's exact test, for
scores in between by resampling items. Only items whose prompts are equal are compared.
"""

import argparse
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from eval.statistics import mcnemar, paired_bootstrap
from mm_train.cli import UserError, command

EPILOG = """examples:
  python -m eval.compare runs/a-eval runs/b-eval
  python -m eval.compare runs/a-eval runs/b-eval --show piqa --items 20    # where they disagree

p: how probable a difference at least this large is if both are equally good. Of many benchmarks, one in twenty falls
below 0.05 by chance; * marks those that stay after Holm's correction.
"""
LEVEL = 0.05


@dataclass(frozen=True)
class Pair:
    """One benchmark in both evaluations; scores over the `n` items that both have."""

    name: str
    n: int
    first: float
    second: float
    interval: tuple[float, float]  # of the difference, second less first, 95 %
    wins: int  # items where the second has the higher score
    losses: int
    p: float
    differ: list[tuple[dict[str, Any], dict[str, Any]]]  # their records, where scores are unequal


def read(folder: Path) -> tuple[dict[str, Any], dict[str, dict[tuple[str, int, str], dict[str, Any]]]]:
    """results.json, and the records of all items by benchmark and by (task, item, prompt). Raises UserError."""
    file = folder / "results.json"
    try:
        results = json.loads(file.read_bytes())
        items = {}
        for name, task in results["tasks"].items():
            if task["status"] == "ok":
                file = folder / "items" / f"{name}.jsonl"
                records = [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
                items[name] = {(r["task"], r["item"], r["prompt"]): r for r in records}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error}): give the --out folder of an eval.run") from None
    return results, items


def pair(name: str, first: dict[Any, dict[str, Any]], second: dict[Any, dict[str, Any]]) -> Pair | None:
    """Two evaluations of a benchmark; None when they have no item in common."""
    both = [key for key in first if key in second]
    if not both:
        return None
    a, b = ([side[key]["score"] for key in both] for side in (first, second))
    low, high, p = paired_bootstrap(a, b)
    if set(a) | set(b) <= {0.0, 1.0}:
        p = mcnemar(a, b)
    wins, losses = sum(x < y for x, y in zip(a, b, strict=True)), sum(x > y for x, y in zip(a, b, strict=True))
    differ = [(first[key], second[key]) for key in both if first[key]["score"] != second[key]["score"]]
    return Pair(name, len(both), sum(a) / len(a), sum(b) / len(b), (low, high), wins, losses, p, differ)


def holm(p_values: list[float]) -> list[bool]:
    """Which of several differences stay significant when all are looked at together."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    stays = [False] * len(p_values)
    for rank, index in enumerate(order):
        if p_values[index] > LEVEL / (len(order) - rank):
            break
        stays[index] = True
    return stays


def table(pairs: list[Pair]) -> list[str]:
    """A line for each benchmark, scores in percent."""
    lines = ["benchmark        items      A      B     B - A   95 % interval    B better  A better        p"]
    stays = holm([found.p for found in pairs])
    for found, kept in zip(pairs, stays, strict=True):
        low, high = (100 * value for value in found.interval)
        lines.append(
            f"{found.name:<15} {found.n:>6} {100 * found.first:>6.1f} {100 * found.second:>6.1f} "
            f"{100 * (found.second - found.first):>+9.1f}   {low:>+6.1f} .. {high:>+5.1f} "
            f"{found.wins:>10} {found.losses:>9} {found.p:>8.4f}{' *' if kept else ''}"
        )
    lines.append(f"* significant together with the others ({sum(stays)} of {len(pairs)}; Holm, {LEVEL:.0%})")
    return lines


def disagreements(found: Pair, count: int) -> list[str]:
    """The first items where scores differ, with what each has answered."""
    lines = [f"{found.name}: {len(found.differ)} of {found.n} items differ"]
    for a, b in found.differ[:count]:
        lines += ["", f"--- {a['task']} item {a['item']}: A {a['score']:g}, B {b['score']:g}", a["context"][-400:]]
        if "choices" in a:
            for index, choice in enumerate(a["choices"]):
                mark = " (right)" if index == a["gold"] else ""
                lines.append(f"    A {a['nats'][index]:>9.3f}  B {b['nats'][index]:>9.3f}  {choice}{mark}")
        else:
            lines += [f"    right: {a['target']}", f"    A: {a['answer']}", f"    B: {b['answer']}"]
    return lines


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.compare",
        description=__doc__,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("first", type=Path, metavar="A", help="--out folder of an eval.run")
    parser.add_argument("second", type=Path, metavar="B", help="another one")
    parser.add_argument("--show", metavar="BENCHMARK", help="items of this benchmark where they disagree")
    parser.add_argument("--items", type=int, default=10, help="how many of them (default: 10)")
    args = parser.parse_args(argv)
    (first, first_items), (second, second_items) = read(args.first), read(args.second)
    pairs, without = [], []
    for name in first_items:
        found = pair(name, first_items[name], second_items.get(name, {}))
        pairs += [found] if found else []
        without += [] if found else [name]
    without += [name for name in second_items if name not in first_items]
    if not pairs:
        raise UserError(f"{args.first} and {args.second} have no item in common: other benchmarks, prompts or data")
    print(f"A: {first['model']} ({first['format']})\nB: {second['model']} ({second['format']})\n")
    print("\n".join(table(pairs)))
    if without:
        print(f"not in both, or with other prompts: {', '.join(without)}")
    if args.show:
        chosen = [found for found in pairs if found.name == args.show]
        if not chosen:
            raise UserError(f"--show {args.show}: not compared; {', '.join(found.name for found in pairs)} are")
        print("\n" + "\n".join(disagreements(chosen[0], args.items)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
