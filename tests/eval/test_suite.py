import pytest

from eval.suite import load_suites, select
from mm_train.cli import UserError


def names(tasks: str) -> list[str]:
    return [benchmark.name for benchmark in select(load_suites(), tasks)]


def test_the_fourteen_of_the_paper():
    suite = load_suites()["paper14"]
    assert len(suite.benchmarks) == 14
    assert sum(b.kind == "multiple_choice" for b in suite.benchmarks) == 9
    assert all(not b.verified for b in suite.benchmarks)
    assert set(suite.published) == {"MobileMoE-S", "MobileMoE-M", "MobileMoE-L"}


def test_select_by_name_task_and_suite_each_once():
    assert names("piqa,hellaswag,piqa") == ["piqa", "hellaswag"]
    assert names("social_iqa, gsm8k_cot") == ["siqa", "gsm8k"]
    assert names("all") == names("paper14")
    assert names("mmlu,all")[:2] == ["mmlu", "hellaswag"]
    assert len(names("mmlu,all")) == 14


@pytest.mark.parametrize(("word", "hint"), [("helaswag", "hellaswag"), ("PIQA", "piqa"), ("arc_eazy", "arc_easy")])
def test_unknown_task_is_named_with_the_nearest(word, hint):
    with pytest.raises(UserError, match=f"unknown task '{word}' in --tasks: did you mean '{hint}'"):
        names(f"piqa,{word}")


def test_unknown_task_that_is_like_nothing():
    with pytest.raises(UserError, match="unknown task 'zzzzzz' in --tasks: known are hellaswag"):
        names("zzzzzz")
