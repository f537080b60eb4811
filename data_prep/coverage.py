"""Which benchmarks a data set has been compared with, and which not: nothing that is missing goes without saying."""

import json
import re
from pathlib import Path
from typing import Any

BENCHMARKS = {  # those that models of this project are scored on, and where the hub has them
    "HellaSwag": "Rowan/hellaswag",
    "PIQA": "baber/piqa",
    "SIQA": "lighteval/siqa",
    "WinoGrande": "allenai/winogrande",
    "ARC": "allenai/ai2_arc",
    "OpenBookQA": "allenai/openbookqa",
    "BoolQ": "aps/super_glue",
    "MMLU": "cais/mmlu",
    "NaturalQuestions": "google-research-datasets/nq_open",
    "TriviaQA": "mandarjoshi/trivia_qa",
    "DROP": "EleutherAI/drop",
    "BBH": "SaylorTwift/bbh",
    "GSM8K": "openai/gsm8k",
    "MATH500": "HuggingFaceH4/MATH-500",
    "HumanEval": "openai/openai_humaneval",
    "MBPP": "google-research-datasets/mbpp",
    "IFEval": "google/IFEval",
    "IFBench": "allenai/IFBench_test",
    "MMLU-Pro": "TIGER-Lab/MMLU-Pro",
    "GPQA": "Idavidrein/gpqa",
}


def coverage(index: Path | None) -> dict[str, Any]:
    """What `benchmarks.build` has indexed in a folder; {} when text was not compared.

    items and too_short count items; those that are too short have fewer words than `benchmarks.short_ngram`, and a text
    that holds one cannot be told from ordinary text. missing: names of BENCHMARKS without items, which
    `benchmarks.mirror` or a file of that name in `benchmarks.extra` would bring.
    """
    if index is None:
        return {}
    facts = json.loads((index / "benchmarks.json").read_bytes())
    items, covered = facts["items"], facts["covered"]
    there = {name for name, count in items.items() if count}
    return {
        "items": sum(items.values()),
        "too_short": sum(items.values()) - sum(covered.values()),
        "missing": [name for name, path in BENCHMARKS.items() if not any(_is(found, name, path) for found in there)],
    }


def in_words(facts: dict[str, Any]) -> str:
    """One line."""
    if not facts:
        return "not compared with benchmarks: benchmarks.mirror and benchmarks.extra name none"
    short = f"; {facts['too_short']:,} of them are too short to be found" if facts["too_short"] else ""
    missing = f"; not compared with {', '.join(facts['missing'])}" if facts["missing"] else ""
    return f"compared with {facts['items']:,} items of benchmarks{short}{missing}"


def _is(found: str, name: str, path: str) -> bool:
    """`found` is PATH/NAME/SPLIT of a mirror, or the name of a file without its ending."""
    return found.startswith(f"{path}/") or _plain(found).startswith(_plain(name))


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
