"""What is in a prepared data set, as one self-contained HTML page.

Reads what data_prep.run wrote: dataset.json, contamination.jsonl of the sources, and shards for lengths and samples.
"""

import argparse
import html
import json
import random
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from data_prep.coverage import in_words
from data_prep.plan import SPLITS
from mm_train import report as training_report
from mm_train.cli import UserError, command
from mm_train.files import write_atomic
from mm_train.log_lines import short
from mm_train.shards import ShardReader
from mm_train.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """examples:
  python -m data_prep.report data/quickstart
  python -m data_prep.report data/sft --out sft.html
"""
LENGTH_TOKENS = 1 << 24  # of a source, whose documents make its histogram
SAMPLE_TOKENS = 220
SHOWN = 30  # rows of a list, at most
BINS = 1 << np.arange(25)  # tokens


@dataclass
class Source:
    """One source of the data set: its entry in dataset.json, and what its files show."""

    name: str
    facts: dict[str, Any]
    lengths: np.ndarray  # tokens of documents of the training split
    sample: str  # HTML
    contaminated: list[dict[str, Any]]

    @property
    def dropped(self) -> dict[str, dict[str, Any]]:
        """Reason -> documents, bytes, examples; the most documents first."""
        items = self.facts["dropped"].items()
        return dict(sorted(items, key=lambda item: -item[1]["documents"]))

    @property
    def num_dropped(self) -> int:
        return sum(item["documents"] for item in self.dropped.values())


@dataclass
class DataReport:
    """All that the page shows."""

    title: str
    summary: dict[str, Any]
    sources: list[Source]

    def total(self, unit: str) -> int:
        """`tokens`, `documents` or `bytes` of the training split."""
        return int(self.summary["totals"]["train"][unit])

    @property
    def domains(self) -> list[tuple[str, list[str], int, float]]:
        """(domain, its sources, training tokens, weight), the heaviest first."""
        rows = []
        for domain in {source.facts["domain"] for source in self.sources}:
            some = [source for source in self.sources if source.facts["domain"] == domain]
            tokens = sum(source.facts["train"]["tokens"] for source in some)
            weight = sum(source.facts["weight"] for source in some)
            rows.append((domain, [source.name for source in some], tokens, weight))
        return sorted(rows, key=lambda row: (-row[3], row[0]))

    @property
    def compared(self) -> dict[str, Any]:
        """What `coverage` said of the benchmarks."""
        facts = self.summary["benchmarks"]
        if not isinstance(facts, dict):
            raise UserError(f"{self.title} was prepared by an earlier version: run data_prep.run again")
        return facts

    @property
    def weight(self) -> float:
        """Of all sources."""
        return sum(source.facts["weight"] for source in self.sources)

    @property
    def reasons(self) -> dict[str, int]:
        """Reason -> documents left out of all sources, the most first."""
        counts: Counter[str] = Counter()
        for source in self.sources:
            counts.update({reason: item["documents"] for reason, item in source.dropped.items()})
        return dict(counts.most_common())

    @property
    def hits(self) -> list[tuple[str, int, int, dict[str, Any]]]:
        """(benchmark, documents, items of it, one of the hits), the most first; subjects of one benchmark together."""
        by_name: dict[str, list[dict[str, Any]]] = {}
        for source in self.sources:
            for hit in source.contaminated:
                name = "/".join(hit["benchmark"].split("/")[:2])
                by_name.setdefault(name, []).append(hit)
        rows = [
            (name, len(some), len({(hit["benchmark"], hit["item"]) for hit in some}), some[0])
            for name, some in by_name.items()
        ]
        return sorted(rows, key=lambda row: (-row[1], row[0]))


def read_data_report(folder: Path, seed: int = 0) -> DataReport:
    """Read a data set folder. Raises UserError when there is none, or it is damaged."""
    try:
        summary = json.loads((folder / "dataset.json").read_bytes())
    except FileNotFoundError:
        raise UserError(f"no data set in {folder}: expected dataset.json, as data_prep.run writes it") from None
    except ValueError as error:
        raise UserError(f"{folder / 'dataset.json'} is damaged: {error}; prepare the data again") from None
    tokenizer = load_tokenizer(folder)
    chance = random.Random(seed)
    sources = []
    for name, facts in summary["sources"].items():
        reader = ShardReader(folder / name / "train")
        file = folder / name / "contamination.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
        hits = [json.loads(line) for line in lines]
        sources.append(
            Source(name, facts, document_lengths(reader, tokenizer), sample(reader, tokenizer, chance), hits)
        )
    return DataReport(folder.resolve().name, summary, sources)


def document_lengths(reader: ShardReader, tokenizer: Tokenizer) -> np.ndarray:
    """Tokens of each whole document among the first LENGTH_TOKENS of a source; padding is none."""
    tokens, _, starts = reader.span(0, min(reader.num_tokens, LENGTH_TOKENS))
    begins = np.flatnonzero(starts)
    lengths = np.diff(begins, append=len(tokens))
    real = tokens[begins] == tokenizer.bos_id
    if reader.num_tokens > len(tokens) and len(real):
        real[-1] = False  # cut off
    return lengths[real]


def sample(reader: ShardReader, tokenizer: Tokenizer, chance: random.Random) -> str:
    """The beginning of a random document as HTML: what is trained on in <b>, control tokens in <i>."""
    begin = chance.randrange(max(1, reader.num_tokens - SAMPLE_TOKENS))
    _, _, starts = reader.span(begin, min(reader.num_tokens, begin + 64 * SAMPLE_TOKENS))
    begin += int(np.flatnonzero(starts)[0]) if starts.any() else 0
    tokens, mask, starts = reader.span(begin, min(reader.num_tokens, begin + SAMPLE_TOKENS))
    end = int(np.flatnonzero(starts[1:])[0]) + 1 if starts[1:].any() else len(tokens)
    control = tokenizer.token_bytes()[tokens] == 0
    parts = []
    for (is_control, trained), run in groupby(range(end), lambda i: (bool(control[i]), bool(mask[i]))):
        text = html.escape(tokenizer.decode(tokens[list(run)].tolist(), skip_special=False))
        parts.append(f"<i>{text}</i>" if is_control else f"<b>{text}</b>" if trained else text)
    return "".join(parts) + ("" if end < SAMPLE_TOKENS else " …")


def histogram(lengths: np.ndarray) -> str:
    """Documents by their length in tokens, in powers of two, as SVG."""
    counts, _ = np.histogram(lengths, BINS)
    if not counts.any():
        return ""
    first, last = np.flatnonzero(counts)[[0, -1]]
    counts = counts[first : last + 1]
    width, height, step = 440, 120, 440 / len(counts)
    shapes = []
    for number, count in enumerate(counts):
        tall = height * count / counts.max()
        low, high = BINS[first + number], BINS[first + number + 1]
        shapes.append(
            f'<rect x="{number * step + 1:.1f}" y="{height - tall:.1f}" width="{step - 2:.1f}" height="{tall:.1f}"'
            f' rx="1.5" fill="var(--c0)"><title>{low:,} to {high - 1:,} tokens: {count:,} documents</title></rect>'
        )
    every = -(-len(counts) // 8)
    for number in range(0, len(counts) + 1, every):
        anchor = "start" if not number else "end" if number == len(counts) else "middle"
        shapes.append(
            f'<text x="{number * step:.1f}" y="{height + 16}" text-anchor="{anchor}" font-size="11" fill="var(--soft)">'
            f"{short(int(BINS[first + number]))}</text>"
        )
    shapes.append(f'<line x1="0" x2="{width}" y1="{height}" y2="{height}" stroke="var(--rule)"/>')
    return f'<svg viewBox="0 0 {width} {height + 22}" role="img">{"".join(shapes)}</svg>'


def bars(parts: list[tuple[str, float, int]]) -> str:
    """Shares of a whole as one bar: (label, share, number of the colour)."""
    shapes, at = [], 0.0
    for label, share, colour in parts:
        fill = f"var(--c{colour % 8})"
        shapes.append(
            f'<rect x="{at:.3%}" width="{share:.3%}" height="18" fill="{fill}"><title>{html.escape(label)}: {share:.1%}'
            "</title></rect>"
        )
        at += share
    return f'<svg width="100%" height="18" role="img">{"".join(shapes)}</svg>'


def quantiles(lengths: np.ndarray) -> str:
    """Median and tail of lengths in words."""
    if not len(lengths):
        return "no whole document"
    middle, tail = np.quantile(lengths, [0.5, 0.99], method="lower")
    return f"median {middle:,} tokens, 99 % below {tail:,}, longest {lengths.max():,}"


def style() -> str:
    """The style sheet of the pages of this project."""
    page = Path(training_report.__file__).with_name("report_template.html").read_text(encoding="utf-8")
    found = re.search(r"<style>(.*?)</style>", page, re.DOTALL)
    assert found is not None
    return found.group(1)


def render(report: DataReport) -> str:
    """The page; it fetches nothing from elsewhere. Raises UserError when jinja2 is not installed."""
    try:
        import jinja2
    except ImportError as error:
        raise UserError(f'the report needs {error.name}: pip install "mobilemoe-train[report]"') from None
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["short"] = short
    template = environment.from_string(Path(__file__).with_name("report_template.html").read_text(encoding="utf-8"))
    return template.render(
        report=report,
        style=style(),
        histogram=histogram,
        bars=bars,
        quantiles=quantiles,
        splits=SPLITS,
        shown=SHOWN,
        compared=in_words(report.compared),
    )


def lines(report: DataReport) -> Iterator[str]:
    """The report for the console."""
    for domain, names, tokens, weight in report.domains:
        share = tokens / max(1, report.total("tokens"))
        yield f"{domain:12}{tokens:>15,} tokens {share:>6.1%} (weight {weight / report.weight:.1%}): {', '.join(names)}"
    for reason, documents in report.reasons.items():
        yield f"left out: {documents:,} {reason}"
    for name, documents, items, _ in report.hits:
        yield f"in benchmark {name}: {documents:,} documents, {items:,} items"
    yield in_words(report.compared)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.report",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", type=Path, help="a data set folder")
    parser.add_argument("--out", type=Path, help="where to write the page (default: report.html in FOLDER)")
    parser.add_argument("--seed", type=int, default=0, help="of the samples")
    arguments = parser.parse_args(argv)
    report = read_data_report(arguments.folder, arguments.seed)
    page = arguments.out or arguments.folder / "report.html"
    try:
        page.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(page, render(report).encode())
    except OSError as error:
        raise UserError(f"cannot write the report {page}: {error.strerror or error}") from None
    print("\n".join([*lines(report), f"Report: {page}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
