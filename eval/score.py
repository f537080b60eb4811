"""One benchmark on one model, by lm-eval's own task definitions: its prompts, its choices, its scorers."""

import itertools
import logging
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.lm import MobileMoELM
from eval.mirror import Mirror, MissingDataError
from eval.suite import Benchmark
from mm_train.cli import UserError

FEWSHOT_SEED = 1234  # lm-eval's default


@dataclass(frozen=True)
class Score:
    """Result of one benchmark. `score`, `stderr` and `chance` are fractions; `stderr` is None for a single item."""

    score: float
    stderr: float | None
    n: int
    n_total: int
    chance: float  # mean over the items of 1 / number of choices
    bits_per_byte: float  # of the right answers: all their bits over all their UTF-8 bytes
    num_truncated: int  # requests cut to the model's context


def offline() -> None:
    """Keep this process and its children off the network, and lm-eval and datasets quiet."""
    os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"
    try:
        import datasets
        import lm_eval  # noqa: F401
    except ImportError as error:
        raise UserError(f"evaluation needs the eval extra ({error}): pip install -e '.[eval]'") from None
    datasets.disable_progress_bars()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def load_tasks(benchmark: Benchmark, mirror: Mirror) -> list[Any]:
    """lm-eval's tasks of a benchmark, sorted by name: one, or the members of its group (MMLU: 57).

    Raises MissingDataError if the mirror lacks a data set, split or the few-shot examples.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    with mirror.serving():
        manager = lm_eval.tasks.TaskManager(include_path=root / benchmark.folder, include_defaults=False)
        tasks = manager.load([benchmark.task])["tasks"]
    for name, task in tasks.items():
        task.set_fewshot_seed(FEWSHOT_SEED)
        if benchmark.shots > len(task.sampler.df):
            raise MissingDataError(f"{name} needs {benchmark.shots} few-shot examples, found {len(task.sampler.df)}")
    return [tasks[name] for name in sorted(tasks)]


def choose(sizes: list[int], limit: int | None) -> list[tuple[int, int]]:
    """Which items of a benchmark's tasks to run, as (task, item).

    Without a limit all of them, task by task. With one, `limit` in total, dealt round robin: the first item of every
    task, then the second of every task, and so on.
    """
    if limit is None:
        return [(task, item) for task, size in enumerate(sizes) for item in range(size)]
    turns = ((task, item) for item in range(max(sizes)) for task, size in enumerate(sizes) if item < size)
    return list(itertools.islice(turns, limit))


def score(benchmark: Benchmark, mirror: Mirror, lm: MobileMoELM, limit: int | None) -> Score:
    """Run a multiple-choice benchmark on `limit` of its items (None: all). Raises MissingDataError."""
    from lm_eval.api.metrics import mean_stderr

    tasks = load_tasks(benchmark, mirror)
    sizes = [len(task.task_docs) for task in tasks]
    items = []  # (task, document, its requests: one a choice)
    for task_index, item in tqdm(choose(sizes, limit), desc=f"{benchmark.name}: prompts", leave=False, disable=None):
        task = tasks[task_index]
        document = task.task_docs[item]
        context = task.fewshot_context(document, num_fewshot=benchmark.shots, gen_prefix=task.doc_to_prefix(document))
        requests = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, item, 1))
        items.append((task, document, requests))

    cut_before = lm.num_truncated
    answers = iter(lm.loglikelihood([request for *_, requests in items for request in requests], benchmark.name))
    values, nats, num_bytes = [], 0.0, 0
    for task, document, requests in items:
        results = list(itertools.islice(answers, len(requests)))
        values.append(task.process_results(document, results)[benchmark.metric])
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        nats -= results[gold][0]
        num_bytes += len(requests[gold].args[1].encode())
    return Score(
        score=tasks[0].aggregation()[benchmark.metric](values),
        stderr=mean_stderr(values) if len(values) > 1 else None,
        n=len(values),
        n_total=sum(sizes),
        chance=sum(1 / len(requests) for *_, requests in items) / len(items),
        bits_per_byte=nats / math.log(2) / num_bytes,
        num_truncated=lm.num_truncated - cut_before,
    )
