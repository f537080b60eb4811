"""One benchmark on one model: its score, how sure it is, and what was answered to each item."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eval.lm import LM
from eval.mirror import Mirror
from eval.statistics import interval
from eval.suite import Benchmark
from eval.tasks import Item, Questions, build, judge


@dataclass(frozen=True)
class Score:
    """Result of one benchmark. Scores, errors and chance are fractions."""

    score: float  # over all items (micro)
    stderr: float | None  # None for a single item
    interval: tuple[float, float]  # 95 %
    macro: float  # mean over the benchmark's tasks (subjects); the score itself where there is one
    n: int
    n_total: int
    chance: float  # mean over the items of 1 / number of choices; 0 where answers are written
    centred: float  # 0 for guessing, 1 for all right
    bits_per_byte: float | None  # of the right answers: all their bits over all their UTF-8 bytes
    metrics: dict[str, float]  # every score that lm-eval takes, by "metric,filter"
    prompt_hash: str  # of all prompts with their choices or stops, in order
    num_truncated: int  # requests cut to the model's context
    num_shortened: int  # answers that may be only half a context long


def answer(benchmark: Benchmark, mirror: Mirror, lm: LM, limit: int | None) -> None:
    """A rank's share of a benchmark, whose score another rank takes. Raises as `score` does, on all ranks alike."""
    questions = build(benchmark, mirror, limit)
    lm.answer([(number, r) for number, item in enumerate(questions.items) for r in item.requests], benchmark.name)


def score(benchmark: Benchmark, mirror: Mirror, lm: LM, limit: int | None) -> tuple[Score, list[dict[str, Any]]]:
    """Run a benchmark on `limit` of its items (None: all); also a record of each item.

    Raises MissingDataError and CannotRunError.
    """
    questions = build(benchmark, mirror, limit)
    requests = [(number, r) for number, item in enumerate(questions.items) for r in item.requests]
    found = lm.answer(requests, benchmark.name)
    scores = judge(questions, found.answers)
    values = [float(values[benchmark.key]) for values in scores]
    by_task: dict[str, list[float]] = {}
    for item, value in zip(questions.items, values, strict=True):
        by_task.setdefault(item.task.task_name, []).append(value)
    mean = sum(values) / len(values)
    choices = [len(item.requests) for item in questions.items]
    chance = sum(1 / n for n in choices) / len(choices) if benchmark.kind == "multiple_choice" else 0.0
    result = Score(
        score=mean,
        stderr=_stderr(values),
        interval=interval(values),
        macro=sum(sum(part) / len(part) for part in by_task.values()) / len(by_task),
        n=len(values),
        n_total=questions.total,
        chance=chance,
        centred=(mean - chance) / (1 - chance),
        bits_per_byte=_bits_per_byte(questions.items, found.answers),
        metrics=_metrics(questions, scores),
        prompt_hash=_prompt_hash(request for _, request in requests),
        num_truncated=found.num_cut,
        num_shortened=found.num_shortened,
    )
    return result, _records(questions.items, found.answers, scores, benchmark)


def _stderr(values: list[float]) -> float | None:
    from lm_eval.api.metrics import mean_stderr

    return mean_stderr(values) if len(values) > 1 else None


def _metrics(questions: Questions, scores: list[dict[str, Any]]) -> dict[str, float]:
    """Every metric over all items, by lm-eval's own way to sum it up."""
    aggregation = questions.tasks[0].aggregation()
    found = {}
    for key in scores[0]:
        metric = key.rpartition(",")[0]
        values = [values[key] for values in scores]
        found[key] = float(aggregation[metric](values) if metric in aggregation else sum(values) / len(values))
    return found


def _bits_per_byte(items: Sequence[Item], answers: list[Any]) -> float | None:
    nats, num_bytes, start = 0.0, 0, 0
    for item in items:
        gold = item.gold
        if gold is not None:
            nats -= answers[start + gold][0]
            num_bytes += len(item.requests[gold].args[1].encode())
        start += len(item.requests)
    return nats / math.log(2) / num_bytes if num_bytes else None


def _prompt_hash(requests: Any) -> str:
    digest = hashlib.sha256()
    for request in requests:
        digest.update(repr(request.args).encode("utf-8", "backslashreplace"))
    return digest.hexdigest()


def _records(
    items: Sequence[Item], answers: list[Any], scores: list[dict[str, Any]], benchmark: Benchmark
) -> list[dict[str, Any]]:
    """What was asked and answered, an object an item."""
    records, start = [], 0
    for item, values in zip(items, scores, strict=True):
        given = answers[start : start + len(item.requests)]
        start += len(item.requests)
        record = {
            "task": item.task.task_name,
            "item": item.index,
            "prompt": hashlib.sha256(
                repr([r.args for r in item.requests]).encode("utf-8", "backslashreplace")
            ).hexdigest(),
            "score": float(values[benchmark.key]),
            "context": item.requests[0].args[0][-2000:],
        }
        if benchmark.kind == "multiple_choice":
            record |= {
                "choices": [request.args[1] for request in item.requests],
                "nats": [round(nats, 4) for nats, _ in given],
                "gold": item.gold,
            }
        else:
            record |= {"answer": given[0], "target": str(item.task.doc_to_target(item.document))[:500]}
        records.append(record)
    return records
