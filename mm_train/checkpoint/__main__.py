"""Look into checkpoints, check them, write them anew, average them.

python -m mm_train.checkpoint inspect|verify|convert|average|bench
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_train import config
from mm_train.cli import UserError, command
from mm_train.files import is_folder
from mm_train.rules import validate_model

EXAMPLES = """examples:
  python -m mm_train.checkpoint inspect runs/quickstart/pretrain
  python -m mm_train.checkpoint inspect runs/quickstart/pretrain/checkpoints/step-00000100 --tensors
  python -m mm_train.checkpoint verify runs/quickstart/pretrain
  python -m mm_train.checkpoint convert runs/quickstart/pretrain weights/ --files 1 --weights-only
  python -m mm_train.checkpoint average runs/quickstart/pretrain --last 2 --out average/
  python -m mm_train.checkpoint bench configs/model/tiny.yaml model.hidden_size=512 --repeats 9

A PATH is a run folder (its newest checkpoint; for verify all of them) or the folder of one checkpoint.
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.checkpoint",
        description="Look into checkpoints, check them, write them anew, average them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="inspect | verify | convert | average | bench"
    )

    inspect = commands.add_parser("inspect", help="what a checkpoint holds, and who wrote it")
    inspect.add_argument("path", type=Path, metavar="PATH", help="run or checkpoint folder")
    inspect.add_argument("--tensors", action="store_true", help="list the tensors with their norms (reads all of them)")
    inspect.add_argument("--json", action="store_true", help="print the same facts for programs")

    verify = commands.add_parser("verify", help="hash every file; exit with 1 when one is not as it was written")
    verify.add_argument("path", type=Path, metavar="PATH", help="run (all its checkpoints) or checkpoint folder")

    convert = commands.add_parser("convert", help="write a checkpoint anew, in another number of files")
    convert.add_argument("path", type=Path, metavar="PATH", help="run or checkpoint folder")
    convert.add_argument("out", type=Path, metavar="OUT", help="new checkpoint folder")
    convert.add_argument("--files", type=int, default=1, metavar="N", help="of about equal size (default 1)")
    convert.add_argument("--weights-only", action="store_true", help="leave out the moments: a third of the bytes")

    average = commands.add_parser("average", help="write the mean of the weights of several checkpoints")
    average.add_argument("paths", nargs="+", type=Path, metavar="PATH", help="a run, or checkpoints, oldest first")
    average.add_argument("--last", type=int, metavar="N", help="the newest N checkpoints of the run")
    average.add_argument(
        "--ema", type=float, metavar="F", help="each counts F times what the next one does (default: 1)"
    )
    average.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="new checkpoint folder")

    bench = commands.add_parser("bench", help="seconds that training stands still, against writing at once")
    bench.add_argument("configs", nargs="+", metavar="FILE.yaml | key=value", help="model file, then overrides")
    bench.add_argument("--repeats", type=int, default=5, metavar="N", help="of either way, by turns (default 5)")
    bench.add_argument("--folder", type=Path, default=Path(), metavar="DIR", help="on the disk to measure (default .)")
    bench.add_argument("--json", action="store_true", help="print the same facts for programs")

    args = parser.parse_args(argv)
    return {"inspect": _inspect, "verify": _verify, "convert": _convert, "average": _average, "bench": _bench}[
        args.command
    ](args)


def _inspect(args: argparse.Namespace) -> int:
    from mm_train.checkpoint.show import inspect, inspect_text

    facts = inspect(args.path, args.tensors)
    print(json.dumps(facts, indent=1) if args.json else "\n".join(inspect_text(facts)))
    return 0


def _verify(args: argparse.Namespace) -> int:
    from mm_train.checkpoint.show import verify

    good = True
    for right, line in verify(args.path):
        good &= right
        print(line, flush=True)
    return 0 if good else 1


def _convert(args: argparse.Namespace) -> int:
    from mm_train.checkpoint.convert import convert
    from mm_train.checkpoint.format import open_checkpoint

    made = open_checkpoint(convert(args.path, args.out, args.files, args.weights_only))
    print(f"{made.folder}: step {made.step}, {', '.join(made.kinds)}; {len(made.records)} files, {made.bytes:,} bytes")
    return 0


def _average(args: argparse.Namespace) -> int:
    from mm_train.checkpoint.average import average
    from mm_train.checkpoint.format import open_checkpoint

    made = open_checkpoint(average(args.paths, args.out, args.last, args.ema))
    steps = ", ".join(f"{source['step']:,} ({source['share']:.3g})" for source in made.manifest["average"])
    print(f"{made.folder}: the average of steps {steps}; {made.bytes:,} bytes")
    return 0


def _bench(args: argparse.Namespace) -> int:
    from mm_train.checkpoint.bench import bench, bench_text

    if args.repeats < 1:
        raise UserError(f"--repeats is {args.repeats}; it must be at least 1")
    if not is_folder(args.folder):
        raise UserError(f"no such folder: {args.folder}")
    cfg = config.load_words(args.configs, check=lambda cfg: validate_model(cfg.model))
    facts = bench(cfg, args.repeats, args.folder)
    print(json.dumps(facts) if args.json else bench_text(facts))
    return 0


if __name__ == "__main__":
    sys.exit(main())
