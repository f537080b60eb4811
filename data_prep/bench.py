"""Measures the preparation of real text beside megatron-core's and datatrove's, on one core each, in one run.

The same JSON lines go through each pipeline to its token files. MB/s are megabytes of UTF-8 text by seconds of one
core, all processes of a pipeline counted (user and system time), so that other work on the machine matters little; with
and without the time that the pipeline takes for a single short document. Our tokens are compared with tiktoken's.
"""

import argparse
import gzip
import importlib.util
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

import numpy as np

from data_prep.bench_peers import PIPELINES
from data_prep.fast_tokenizer import Engine
from data_prep.machine import LIBRARY
from mm_train.cli import UserError, command
from mm_train.shards import ShardReader
from mm_train.tokenizer import load_tokenizer

EXAMPLES = """examples:
  apt-get download linux-doc-6.1 python3.11-doc perl-doc && for deb in *.deb; do dpkg-deb -x $deb text; done
  python -m data_prep.bench --text text
  python -m data_prep.bench --megabytes 20 --only ours
"""
SUFFIXES = (".txt", ".rst", ".md", ".html", ".pod", ".py", ".txt.gz", ".rst.gz", ".html.gz", ".3perl.gz")


@dataclass
class Result:
    """Seconds of one core that a pipeline took for the corpus, and for one short document."""

    cpu: list[float] = field(default_factory=list)
    start: list[float] = field(default_factory=list)


def texts(folders: Sequence[Path]) -> Iterator[str]:
    """The text files of the standard library and of `folders`, each text once; pages without their tags."""
    seen = set()
    for folder in (LIBRARY, *folders):
        for file in sorted(folder.rglob("*")):
            if not file.name.endswith(SUFFIXES) or "site-packages" in file.parts or not file.is_file():
                continue
            data = file.read_bytes()
            try:
                text = (gzip.decompress(data) if file.suffix == ".gz" else data).decode()
            except (OSError, EOFError, UnicodeDecodeError):
                continue
            text = _without_tags(text) if ".html" in file.name else text
            if text.strip() and hash(text) not in seen:
                seen.add(hash(text))
                yield text


def write_corpus(folder: Path, found: Iterator[str], max_bytes: int) -> tuple[int, int]:
    """Write up to `max_bytes` of text as JSON lines; returns (documents, bytes of text)."""
    folder.mkdir(parents=True)
    documents = total = 0
    with (folder / "text.jsonl").open("w", encoding="utf-8") as lines:
        for text in found:
            lines.write(json.dumps({"text": text, "id": str(documents)}, ensure_ascii=False) + "\n")
            documents += 1
            total += len(text.encode())
            if total >= max_bytes:
                break
    return documents, total


def measure(name: str, corpus: Path, tokenizer: Path, out: Path) -> tuple[float, float]:
    """(seconds of core, seconds of clock) that a pipeline takes, pinned to one core."""
    core = min(os.sched_getaffinity(0))
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "data_prep.bench_peers", name, str(corpus), str(tokenizer), str(out)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        preexec_fn=lambda: os.sched_setaffinity(0, {core}),
    )
    if done.returncode:
        raise UserError(f"the pipeline '{name}' failed: {(done.stdout.strip().splitlines() or ['no message'])[-1]}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, time.monotonic() - start


def turns(names: Sequence[str], repeats: int) -> list[str]:
    """The order of the runs: ours, which are short, `repeats` times, and the others', once each, between them."""
    ours, others = ([name for name in names if name.startswith("ours") is own] for own in (True, False))
    rounds = [[*ours, *others[number::repeats]] for number in range(repeats)]
    return [name for names in rounds for name in names]


def check_tokens(out: Path, corpus: Path, tokenizer: Path, sha256: str) -> tuple[int, int]:
    """(documents, tokens) of our shards, all of which are BOS, what tiktoken gives for the text, EOS.

    Raises UserError for the first document that is not.
    """
    loaded = load_tokenizer(tokenizer)
    truth = Engine("tiktoken", tokenizer, sha256).load()
    documents = tokens = 0
    lines = (corpus / "text.jsonl").open(encoding="utf-8")
    for (found, _), line in zip(ShardReader(out / "text" / "train").documents(), lines, strict=True):
        ids, _ = truth([json.loads(line)["text"]])
        if not np.array_equal(found, [loaded.bos_id, *ids.tolist(), loaded.eos_id]):
            raise UserError(f"document {documents} of {corpus} has other tokens than tiktoken gives")
        documents += 1
        tokens += len(found)
    return documents, tokens


def table(results: dict[str, Result], megabytes: float) -> str:
    """The measurements, with the ratio of ours to each."""
    rows = [f"{'pipeline':30}{'core s':>9}{'of it start':>13}{'MB/s':>8}{'without start':>15}{'ours is':>10}{'':>10}"]
    times = {name: (statistics.median(found.cpu), statistics.median(found.start)) for name, found in results.items()}
    best, best_start = next(iter(times.values()))
    for name, (cpu, start) in times.items():
        rows.append(
            f"{name:30}{cpu:>9.2f}{start:>13.2f}{megabytes / cpu:>8.2f}{megabytes / (cpu - start):>15.2f}"
            f"{cpu / best:>9.1f}x{(cpu - start) / (best - best_start):>9.1f}x"
        )
    return "\n".join(rows)


class _Text(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self._skipped += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.parts.append(data)


def _without_tags(page: str) -> str:
    parser = _Text()
    parser.feed(page)
    return "".join(parser.parts)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.bench",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--text", type=Path, action="append", default=[], help="a folder with more text; may be given again"
    )
    parser.add_argument("--megabytes", type=float, default=1e6, help="take no more than this (default: all there is)")
    parser.add_argument(
        "--tokenizer", default="llama3", help="llama3, or a folder with tokenizer.json (default: llama3)"
    )
    parser.add_argument("--only", action="append", choices=list(PIPELINES), help="these pipelines (default: all)")
    parser.add_argument(
        "--repeats", type=int, default=3, help="of ours, which is short; the median counts (default: %(default)s)"
    )
    arguments = parser.parse_args(argv)
    if arguments.repeats < 1:
        raise UserError(f"--repeats is {arguments.repeats}; it must be at least 1")
    for folder in arguments.text:
        if not folder.is_dir():
            raise UserError(f"--text {folder} is not a folder")
    names = arguments.only or [
        name for name in PIPELINES if "benchmarks" not in name or Path("data/eval/mirror.json").is_file()
    ]
    for package in ("tiktoken", *(["megatron", "transformers"] if any("megatron" in name for name in names) else [])):
        if importlib.util.find_spec(package) is None:
            raise UserError(f"the comparison needs {package}, which is not installed: make install")
    Path("data").mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="bench-", dir="data") as temporary:
        place = Path(temporary).resolve()
        documents, num_bytes = write_corpus(place / "corpus", texts(arguments.text), int(arguments.megabytes * 1e6))
        write_corpus(place / "short", iter(["A short document."]), 1)
        tokenizer = load_tokenizer(arguments.tokenizer)
        tokenizer.save(place / "tokenizer")
        print(
            f"{num_bytes / 1e6:.1f} MB of text in {documents:,} documents, tokenizer {arguments.tokenizer}", flush=True
        )
        results = {name: Result() for name in names}
        for number, name in enumerate(turns(names, arguments.repeats)):
            cpu, wall = measure(name, place / "corpus", place / "tokenizer", place / f"out-{number}")
            print(f"{name}: {cpu:.2f} core s, {wall:.2f} s", flush=True)
            results[name].cpu.append(cpu)
            if number:
                shutil.rmtree(place / f"out-{number}")
        for number, name in enumerate(turns(names, arguments.repeats)):
            results[name].start.append(
                measure(name, place / "short", place / "tokenizer", place / f"start-{number}")[0]
            )
        print(table(results, num_bytes / 1e6))
        if names[0] == "ours":
            counted, tokens = check_tokens(place / "out-0", place / "corpus", place / "tokenizer", tokenizer.sha256)
            print(f"tokens of all {counted:,} documents ({tokens:,}) are those of tiktoken")
    return 0


if __name__ == "__main__":
    sys.exit(main())
