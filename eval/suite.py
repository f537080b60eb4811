"""Which benchmarks there are and how each is run: reads suites/*.yaml. Needs neither lm-eval nor torch."""

import difflib
from dataclasses import dataclass
from pathlib import Path

import yaml

from mm_train.cli import UserError

SUITES = Path(__file__).parent / "suites"


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
    kind: str  # multiple_choice | generative
    task: str
    folder: str
    shots: int
    verified: bool
    metric: str
    dataset: DatasetRef
    note: str = ""


@dataclass(frozen=True)
class Suite:
    """A named list of benchmarks and the averages published for it, in percent by model name."""

    benchmarks: tuple[Benchmark, ...]
    published: dict[str, float]


def load_suites() -> dict[str, Suite]:
    """All suites by file name."""
    suites = {}
    for file in sorted(SUITES.glob("*.yaml")):
        document = yaml.safe_load(file.read_text(encoding="utf-8"))
        benchmarks = tuple(
            Benchmark(name=name, **{**fields, "dataset": DatasetRef(**fields["dataset"])})
            for name, fields in document["benchmarks"].items()
        )
        suites[file.stem] = Suite(benchmarks, document["published"])
    return suites


def select(suites: dict[str, Suite], tasks: str) -> list[Benchmark]:
    """The benchmarks that a comma-separated list asks for, each once: suite names, benchmark names, lm-eval task
    names, or `all`. Raises UserError for an unknown word, with the nearest known one."""
    known: dict[str, list[Benchmark]] = {}
    for benchmark in (b for suite in suites.values() for b in suite.benchmarks):
        known.setdefault(benchmark.name, [benchmark])
        known.setdefault(benchmark.task, [benchmark])
    for name, suite in suites.items():
        known[name] = list(suite.benchmarks)
    known["all"] = [b for suite in suites.values() for b in suite.benchmarks]

    chosen: dict[str, Benchmark] = {}
    for word in (word.strip() for word in tasks.split(",")):
        if word not in known:
            near = difflib.get_close_matches(word.lower(), known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise UserError(f"unknown task {word!r} in --tasks: {hint}known are {', '.join(known)}")
        chosen.update((benchmark.name, benchmark) for benchmark in known[word])
    return list(chosen.values())
