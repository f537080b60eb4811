"""Prepares a data set: documents to token shards, with a tokenizer, a held-out split and baselines.

OUT/NAME/train and OUT/NAME/val are the shards of source NAME, OUT/dataset.json sums up, OUT/tokenizer.json encodes.
Running it again continues interrupted work, redoes what has changed (configuration or input), and otherwise does
nothing. The same input gives the same bytes, on any number of processes and machines.
"""

import argparse
import importlib.util
import os
import sys
import time
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

from data_prep.config import load
from data_prep.coverage import in_words
from data_prep.plan import SPLITS
from data_prep.prepare import Share, prepare
from mm_train.cli import UserError, command

EXAMPLES = """examples:
  python -m data_prep.run configs/data/quickstart.yaml
  python -m data_prep.run configs/data/quickstart.yaml --out data/llama3 tokenizer.kind=llama3
  python -m data_prep.run my.yaml --workers 16 sources.books.max_bytes=100000000
  python -m data_prep.run configs/data/pretrain.yaml --rank $SLURM_ARRAY_TASK_ID --world 64   # in each of 64 tasks
"""


def describe(summary: dict[str, Any]) -> str:
    """The tables that end a preparation: what is in the data set, and what is not and why."""
    lines = [f"{'source':12}{'split':7}{'documents':>11}{'tokens':>13}{'MB':>9}{'bytes/token':>13}{'padding':>9}"]
    rows = [(name, split, source[split]) for name, source in summary["sources"].items() for split in SPLITS]
    rows += [("total", split, {"padding": 0, **summary["totals"][split]}) for split in SPLITS]
    for name, split, facts in rows:
        per_token = facts["bytes"] / facts["tokens"] if facts["tokens"] else 0
        padding = facts["padding"] / facts["tokens"] if facts["tokens"] else 0
        lines.append(
            f"{name:12}{split:7}{facts['documents']:>11,}{facts['tokens']:>13,}{facts['bytes'] / 1e6:>9.2f}"
            f"{per_token:>13.2f}{padding:>9.2%}"
        )
    lines.append("")
    for name, source in summary["sources"].items():
        for reason, count in source["dropped"].items():
            lines.append(f"left out of {name}: {count['documents']:,} {reason} ({count['bytes'] / 1e6:.2f} MB)")
        if source["texts_cut_into_rows"]:
            lines.append(f"cut into rows in {name}: {source['texts_cut_into_rows']:,} texts longer than a row")
        if not source["val"]["documents"]:
            lines.append(f"warning: nothing is held out of {name}; more documents or a larger validation_fraction help")
    lines.append(in_words(summary["benchmarks"]))
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line of the preparation."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.run",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file, see configs/data/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a value of the config")
    parser.add_argument("--out", help="folder of the data set (default: `out` of the config)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    parser.add_argument("--rank", type=int, default=0, help="which of --world runs that share the work this one is")
    parser.add_argument("--world", type=int, default=1, help="how many runs share the work, on one file system")
    parser.add_argument(
        "--wait", type=float, default=600, metavar="SECONDS", help="for other ranks before giving up (default: 600)"
    )
    arguments = parser.parse_intermixed_args(argv)  # options and key=value in any order
    overrides = [*arguments.overrides, *([f"out={arguments.out}"] if arguments.out else [])]
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1")
    if not 0 <= arguments.rank < arguments.world:
        raise UserError(f"--rank is {arguments.rank}; it must lie in 0..{arguments.world - 1}, below --world")
    if importlib.util.find_spec("zstandard") is None:
        raise UserError("data_prep needs the package zstandard: pip install 'mobilemoe-train[data]'")
    start = time.monotonic()
    config = load(arguments.config, overrides)
    share = Share(arguments.rank, arguments.world, arguments.wait)
    try:
        summary = prepare(config, arguments.workers, share)
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise UserError(f"cannot prepare {config.out}: {place}{error.strerror or error}") from None
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory: try fewer than --workers {arguments.workers}; "
            "the same command continues"
        ) from None
    if summary is None:
        print(f"rank {share.rank} of {share.world} has done its part, {time.monotonic() - start:.1f} s")
        return 0
    print(describe(summary))
    print(f"\n{config.out}: vocabulary {summary['vocab_size']:,}, {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
