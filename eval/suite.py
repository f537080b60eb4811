"""Which benchmarks there are and how each is run: reads suites/*.yaml. Needs neither lm-eval nor torch."""

import difflib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from mm_train.cli import UserError

SUITES = Path(__file__).parent / "suites"
ALL = ("paper14", "advanced")  # what `--tasks all` stands for; `early` is a selection for models in training


@dataclass(frozen=True)
class DatasetRef:
    """A split of a data set, by its name on the hub; `name` None stands for all its configurations together."""

    path: str
    split: str
    name: str | None = None


@dataclass(frozen=True)
class Benchmark:
    """One benchmark of a suite. Field meanings: the head of suites/paper14.yaml."""

    name: str
    group: str
    kind: str  # multiple_choice | generative | code
    task: str
    version: float
    folder: str
    shots: int
    metric: str
    dataset: DatasetRef
    items: int
    filter: str = "none"
    verified: bool = False
    examples: str | None = None
    note: str = ""

    @property
    def key(self) -> str:
        """lm-eval's name for the score that counts: metric and filter."""
        return f"{self.metric},{self.filter}"


@dataclass(frozen=True)
class Suite:
    """A named list of benchmarks; what is published for it, in percent by model: `average` and benchmarks' names."""

    name: str
    benchmarks: tuple[Benchmark, ...]
    published: dict[str, dict[str, float]]


def load_suites() -> dict[str, Suite]:
    """All suites by file name."""
    documents = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(SUITES.glob("*.yaml"))}
    known = {
        name: _benchmark(name, fields)
        for document in documents.values()
        for name, fields in document["benchmarks"].items()
    }
    return {
        stem: Suite(
            stem,
            tuple(known[name] for name in [*document.get("include", []), *document["benchmarks"]]),
            document["published"],
        )
        for stem, document in documents.items()
    }


def _benchmark(name: str, fields: dict[str, Any]) -> Benchmark:
    return Benchmark(name=name, **{**fields, "dataset": DatasetRef(**fields["dataset"])})


def select(suites: dict[str, Suite], tasks: str) -> list[Benchmark]:
    """The benchmarks that a list asks for, each once, in the list's order.

    Words are separated by commas or bars: suites, groups, benchmarks, lm-eval tasks, or `all`. Raises UserError for an
    unknown word, with the nearest known one.
    """
    known: dict[str, list[Benchmark]] = {}
    for benchmark in (b for name in (*ALL, *suites) for b in suites[name].benchmarks):
        known.setdefault(benchmark.name, [benchmark])
        known.setdefault(benchmark.task, [benchmark])
    for benchmark in (b for name in ALL for b in suites[name].benchmarks):
        known.setdefault(benchmark.group, []).append(benchmark)
    for name, suite in suites.items():
        known[name] = list(suite.benchmarks)
    known["all"] = [b for name in ALL for b in suites[name].benchmarks]

    chosen: dict[str, Benchmark] = {}
    for word in (word.strip() for word in re.split(r"[,|]", tasks)):
        if word not in known:
            near = difflib.get_close_matches(word.lower(), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown task {word!r} in --tasks: {hint}known are {', '.join(known)}")
        chosen.update((benchmark.name, benchmark) for benchmark in known[word])
    return list(chosen.values())
