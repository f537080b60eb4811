"""All of results.json: what every benchmark scored or why it did not, averages, and what the scores depend on."""

import importlib.metadata
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from eval.lm import LM
from eval.mirror import Mirror, MissingDataError
from eval.score import answer, score
from eval.suite import Benchmark
from eval.tasks import CannotRunError
from mm_train.files import write_atomic

NO_EXECUTION = "its answers are programs: --allow-code-execution runs them, in a sandbox"


def status_of(benchmark: Benchmark, mirror: Mirror, allow_code: bool = False) -> tuple[str, str]:
    """("ok" | "missing" | "not run", reason) as far as it can be told without running."""
    if not mirror.count(benchmark.dataset):
        return "missing", missing(benchmark, mirror, f"no items of {benchmark.dataset.path}")
    if benchmark.kind == "code" and not allow_code:
        return "not run", NO_EXECUTION
    return "ok", ""


def missing(benchmark: Benchmark, mirror: Mirror, what: str) -> str:
    """A reason with its remedy."""
    remedy = benchmark.note or f"python -m eval.prepare_data --out {mirror.folder}"
    return f"{what} in {mirror.folder} ({remedy})"


def evaluate(
    benchmarks: list[Benchmark], mirror: Mirror, lm: LM, limit: int | None, allow_code: bool, items: Path | None
) -> dict[str, Any]:
    """The "tasks" of results.json. `items`: folder for a record of each item; None on a rank that only helps."""
    tasks = {}
    for benchmark in benchmarks:
        status, reason = status_of(benchmark, mirror, allow_code)
        tasks[benchmark.name] = entry = _empty(benchmark, mirror) | {"status": status, "reason": reason}
        if status != "ok":
            continue
        try:
            if items is None:
                answer(benchmark, mirror, lm, limit)
                continue
            result, records = score(benchmark, mirror, lm, limit)
        except MissingDataError as error:
            entry |= {"status": "missing", "reason": missing(benchmark, mirror, str(error))}
            continue
        except CannotRunError as error:
            entry |= {"status": "not run", "reason": str(error)}
            continue
        entry |= asdict(result)
        entry["complete"] = result.n >= benchmark.items
        entry["reason"] = "; ".join(_remarks(benchmark, mirror, entry, lm.engine.context))
        lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_atomic(items / f"{benchmark.name}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"))
    return tasks


def _empty(benchmark: Benchmark, mirror: Mirror) -> dict[str, Any]:
    scores = ("score", "stderr", "interval", "macro", "chance", "centred", "bits_per_byte", "prompt_hash")
    return {
        "status": "",
        "reason": "",
        "metric": benchmark.metric,
        "filter": benchmark.filter,
        "shots": benchmark.shots,
        "verified": benchmark.verified,
        "task": benchmark.task,
        "version": benchmark.version,
        "group": benchmark.group,
        "n": 0,
        "n_total": mirror.count(benchmark.dataset),
        "n_published": benchmark.items,
        "complete": False,
        "data_hash": mirror.data_hash(benchmark),
        **dict.fromkeys(scores),
    }


def _remarks(benchmark: Benchmark, mirror: Mirror, entry: dict[str, Any], context: int) -> list[str]:
    """What is to be known of a score that was computed."""
    remarks = []
    if entry["n_total"] < benchmark.items:
        remarks.append(f"a subset: {entry['n_total']} of {benchmark.items} items are there")
    remarks += mirror.notes(benchmark)
    if entry["num_truncated"]:
        remarks.append(f"{entry['num_truncated']} requests cut on the left to {context} tokens")
    if entry["num_shortened"]:
        remarks.append(f"{entry['num_shortened']} answers end at {context // 2} tokens")
    return remarks


def averages(tasks: dict[str, Any]) -> dict[str, Any]:
    """Over the benchmarks that ran: score, centred score; whether these are all, each on its complete set."""
    ran = [task for task in tasks.values() if task["status"] == "ok"]
    choices = [task for task in ran if task["bits_per_byte"] is not None]
    return {
        "average": _mean([task["score"] for task in ran]),
        "average_complete": len(ran) == len(tasks) and all(task["complete"] for task in ran),
        "centred_average": _mean([task["centred"] for task in choices]),
        "bits_per_byte_average": _mean([task["bits_per_byte"] for task in choices]),
    }


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def versions() -> dict[str, str]:
    """Installed versions of what a score depends on."""
    names = ("lm-eval", "datasets", "tokenizers", "torch", "transformers", "mobilemoe-train")
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
