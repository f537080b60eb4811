from pathlib import Path

import lm_eval.tasks
import pytest
import yaml

from eval.suite import load_suites, select
from mm_train.cli import UserError

TASKS = Path(lm_eval.tasks.__file__).parent


def names(tasks: str) -> list[str]:
    return [benchmark.name for benchmark in select(load_suites(), tasks)]


def test_the_fourteen_of_the_paper():
    suite = load_suites()["paper14"]
    assert len(suite.benchmarks) == 14
    assert sum(b.kind == "multiple_choice" for b in suite.benchmarks) == 9
    assert all(not b.verified for b in suite.benchmarks)
    assert {name: scores["average"] for name, scores in suite.published.items()} == {
        "MobileMoE-S": 46.5,
        "MobileMoE-M": 55.4,
        "MobileMoE-L": 59.8,
        "MobileLLM-Pro-1.1B": 47.0,
        "OLMoE-1B-7B": 52.4,
    }
    known = {"average", *(b.name for b in suite.benchmarks)}
    assert all(set(scores) <= known for scores in suite.published.values())


@pytest.mark.parametrize("benchmark", [b for s in load_suites().values() for b in s.benchmarks], ids=lambda b: b.name)
def test_lm_eval_has_each_task_in_the_version_that_is_written_down(benchmark):
    class Loader(yaml.SafeLoader):
        """Functions in a definition stay unresolved."""

    Loader.add_constructor("!function", lambda loader, node: node.value)
    files = [yaml.load(file.read_text(), Loader) for file in (TASKS / benchmark.folder).glob("*[y_][a_]ml")]
    assert benchmark.task in [definition.get(key) for definition in files for key in ("task", "group")]
    assert benchmark.version in [(definition.get("metadata") or {}).get("version") for definition in files]


def test_early_takes_benchmarks_from_the_other_suites():
    suites = load_suites()
    early = {b.name: b for b in suites["early"].benchmarks}
    assert early["piqa"] in suites["paper14"].benchmarks
    assert early["mmlu_cloze"].shots == 0
    assert all(b.kind == "multiple_choice" for b in early.values())


def test_select_by_name_task_suite_and_group_each_once():
    assert names("piqa,hellaswag,piqa") == ["piqa", "hellaswag"]
    assert names("social_iqa, gsm8k_cot") == ["siqa", "gsm8k"]
    assert names("all") == [*names("paper14"), *names("advanced")]
    assert names("mmlu,paper14")[:2] == ["mmlu", "hellaswag"]
    assert len(names("mmlu,paper14")) == 14
    assert names("reading|code") == ["boolq", "drop", "humaneval", "mbpp"]
    assert names("mmlu_cloze") == ["mmlu_cloze"]


@pytest.mark.parametrize(("word", "hint"), [("helaswag", "hellaswag"), ("PIQA", "piqa"), ("arc_eazy", "arc_easy")])
def test_unknown_task_is_named_with_the_nearest(word, hint):
    with pytest.raises(UserError, match=f"unknown task '{word}' in --tasks: did you mean '{hint}'"):
        names(f"piqa,{word}")


def test_unknown_task_that_is_like_nothing():
    with pytest.raises(UserError, match="unknown task 'zzzzzz' in --tasks: known are hellaswag"):
        names("zzzzzz")
