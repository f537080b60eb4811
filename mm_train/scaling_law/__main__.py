"""The on-device scaling law: train the networks it is fitted on, compare them, fit the law, plan by it.

python -m mm_train.scaling_law sweep SPEC.yaml
python -m mm_train.scaling_law ablation RUNS.csv --out FILE
python -m mm_train.scaling_law fit RUNS.csv --out FOLDER
python -m mm_train.scaling_law plan --memory-gib 5 --train-flops 3.3e20 --active-max 0.3e9
"""

import argparse
import sys
from collections.abc import Sequence

from mm_train.cli import command
from mm_train.scaling_law import ablation, fit, plan, sweep


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.scaling_law", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for part in (sweep, ablation, fit, plan):
        part.add_command(commands)
    args = parser.parse_args(argv)
    return args.func(args)


if __name__ == "__main__":
    sys.exit(main())
