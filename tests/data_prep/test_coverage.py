import json
from pathlib import Path

from data_prep.benchmarks import build
from data_prep.config import BenchmarksConfig
from data_prep.coverage import BENCHMARKS, coverage, in_words


def indexed(folder: Path, files: dict[str, list[dict]]) -> dict:
    folder.mkdir()
    for name, rows in files.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    build(BenchmarksConfig(extra=[f"{folder}/*.jsonl"]), folder / "index")
    return coverage(folder / "index")


def test_what_is_missing_and_what_is_too_short_is_counted(tmp_path):
    long = {"prompt": "write a function that returns the sum of all even numbers in a list of integers"}
    facts = indexed(tmp_path / "a", {"human_eval.jsonl": [long, {"prompt": "add two numbers"}], "bbh-x.jsonl": [long]})
    assert (facts["items"], facts["too_short"]) == (3, 1)
    assert facts["missing"] == [name for name in BENCHMARKS if name not in ("HumanEval", "BBH")]
    assert in_words(facts).startswith(
        "compared with 3 items of benchmarks; 1 of them are too short to be found; not co"
    )


def test_mmlu_pro_is_not_mmlu(tmp_path):
    row = {"question": "what is it"}
    assert "MMLU-Pro" in indexed(tmp_path / "a", {"mmlu.jsonl": [row]})["missing"]
    assert "MMLU-Pro" not in indexed(tmp_path / "b", {"mmlu_pro.jsonl": [row]})["missing"]


def test_text_that_is_not_compared():
    assert coverage(None) == {}
    assert "not compared" in in_words({})
