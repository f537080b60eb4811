import json
import shutil
import subprocess
import sys

import pytest

from eval import run
from eval.mirror import INDEX, Mirror
from mm_train.model import MobileMoE
from mm_train.release import save_release

MULTIPLE_CHOICE = ["hellaswag", "piqa", "siqa", "winogrande", "mmlu", "arc_easy", "arc_challenge"]
MULTIPLE_CHOICE += ["openbookqa", "boolq"]
GENERATIVE = ["nq", "triviaqa", "drop", "gsm8k"]
NO_NETWORK = """
import sys
def refuse(event, args):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise SystemExit(f"network: {event} {args}")
sys.addaudithook(refuse)
from eval.run import main
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def release(small_model, tokenizer, tmp_path_factory):
    model = MobileMoE(small_model)
    model.init_weights(0)
    folder = tmp_path_factory.mktemp("release") / "small"
    save_release(model, folder, "int4", tokenizer)
    return folder


def arguments(mirror, release, out, *more: str) -> list[str]:
    return ["--data", str(mirror.folder), "--model", str(release), "--out", str(out), *more]


def results(out) -> dict:
    return json.loads((out / "results.json").read_text())


def drop(mirror: Mirror, folder, word: str) -> Mirror:
    """A copy of the mirror without the data sets that have `word` in their name."""
    shutil.copytree(mirror.folder, folder)
    content = json.loads((folder / INDEX).read_text())
    content["files"] = {key: entry for key, entry in content["files"].items() if word not in key}
    (folder / INDEX).write_text(json.dumps(content))
    return Mirror(folder)


def test_all_benchmarks_without_touching_the_network(mirror, release, tmp_path):
    command = [
        sys.executable,
        "-c",
        NO_NETWORK,
        *arguments(mirror, release, tmp_path, "--limit", "2", "--tasks", "paper14"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = results(tmp_path)
    assert found["format"] == "int4"
    assert found["limit"] == 2
    assert set(found) == {"model", "format", "limit", "tasks", "average", "seconds", "versions"}
    tasks = found["tasks"]
    assert len(tasks) == 14
    for name in MULTIPLE_CHOICE:
        task = tasks[name]
        assert task["status"] == "ok"
        assert task["n"] == 2 <= task["n_total"]
        assert 0 <= task["score"] <= 1
        assert task["bits_per_byte"] > 0
        assert 0.2 < task["chance"] <= 0.5
        assert task["stderr"] >= 0
    assert {tasks[name]["status"] for name in GENERATIVE} == {"not run"}
    assert tasks["bbh"]["status"] == "missing"
    assert found["average"] == pytest.approx(sum(tasks[name]["score"] for name in MULTIPLE_CHOICE) / 9)
    for name in tasks:
        assert name in done.stdout
        assert f"| {name} |" in (tmp_path / "results.md").read_text()


def test_missing_data_is_told_and_the_exit_status_says_incomplete(mirror, release, tmp_path, capsys):
    partial = drop(mirror, tmp_path / "mirror", "hellaswag")
    out = tmp_path / "out"
    assert run.main(arguments(partial, release, out, "--tasks", "hellaswag,piqa", "--limit", "1")) == 3
    tasks = results(out)["tasks"]
    assert tasks["piqa"]["status"] == "ok"
    assert tasks["hellaswag"]["status"] == "missing"
    assert "no items of Rowan/hellaswag" in tasks["hellaswag"]["reason"]
    assert "python -m eval.prepare_data" in tasks["hellaswag"]["reason"]
    assert "no items of Rowan/hellaswag" in capsys.readouterr().out


def test_part_of_a_benchmark_missing(mirror, release, tmp_path):
    partial = drop(mirror, tmp_path / "mirror", "/anatomy/")
    assert run.main(arguments(partial, release, tmp_path / "out", "--tasks", "mmlu", "--limit", "1")) == 3
    task = results(tmp_path / "out")["tasks"]["mmlu"]
    assert task["status"] == "missing"
    assert "no data set cais/mmlu anatomy" in task["reason"]


def test_without_any_data_everything_is_missing(release, tmp_path):
    assert run.main(arguments(Mirror(tmp_path / "none"), release, tmp_path / "out")) == 3
    found = results(tmp_path / "out")
    assert {task["status"] for task in found["tasks"].values()} == {"missing"}
    assert found["average"] is None


def test_what_this_version_cannot_run_does_not_fail(mirror, release, tmp_path):
    assert run.main(arguments(mirror, release, tmp_path, "--tasks", "gsm8k,bbh")) == 0
    tasks = results(tmp_path)["tasks"]
    assert tasks["gsm8k"]["status"] == "not run"
    assert tasks["gsm8k"]["n_total"] == 1
    assert tasks["bbh"]["status"] == "missing"


def test_finished_benchmarks_are_not_run_again(mirror, release, tmp_path, capsys):
    copy = drop(mirror, tmp_path / "mirror", "nothing")
    out = tmp_path / "out"
    assert run.main(arguments(copy, release, out, "--tasks", "piqa")) == 0
    first = results(out)["tasks"]
    (copy.folder / "baber/piqa/default/validation.arrow").unlink()  # running again would fail
    assert run.main(arguments(copy, release, out, "--tasks", "piqa")) == 0
    assert results(out)["tasks"] == first
    assert run.main(arguments(copy, release, out, "--tasks", "piqa", "--limit", "1")) == 2  # other settings: run
    assert "validation.arrow" in capsys.readouterr().err


def test_another_model_is_run_again(mirror, release, small_model, tokenizer, tmp_path):
    folder = shutil.copytree(release, tmp_path / "small")
    assert run.main(arguments(mirror, folder, tmp_path / "out", "--tasks", "piqa")) == 0
    first = results(tmp_path / "out")["tasks"]["piqa"]
    model = MobileMoE(small_model)
    model.init_weights(1)
    save_release(model, folder, "bf16", tokenizer)
    assert run.main(arguments(mirror, folder, tmp_path / "out", "--tasks", "piqa")) == 0
    assert results(tmp_path / "out")["format"] == "bf16"
    assert results(tmp_path / "out")["tasks"]["piqa"]["bits_per_byte"] != first["bits_per_byte"]


def test_cut_prompts_are_told(mirror, release, tmp_path):
    assert run.main(arguments(mirror, release, tmp_path, "--tasks", "mmlu", "--limit", "3")) == 0
    assert results(tmp_path)["tasks"]["mmlu"]["reason"] == "12 requests (prompt + choice) cut on the left to 256 tokens"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--tasks", "helaswag"], "unknown task 'helaswag' in --tasks: did you mean 'hellaswag'?"),
        (["--model", "nowhere"], "--model nowhere: no such folder"),
    ],
)
def test_bad_input_is_one_line(mirror, release, tmp_path, capsys, more, message):
    assert run.main(arguments(mirror, release, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_folder_without_a_model_is_refused(mirror, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run.main(arguments(mirror, tmp_path / "empty", tmp_path / "out")) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'empty'}")


def test_unwritable_out_is_one_line(mirror, release, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert run.main(arguments(mirror, release, tmp_path / "file", "--tasks", "piqa")) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


@pytest.mark.parametrize("value", ["0", "-3", "many"])
def test_limit_must_be_a_positive_number(value, capsys):
    with pytest.raises(SystemExit) as stop:
        run.main(["--model", ".", "--limit", value])
    assert stop.value.code == 2
    assert "--limit" in capsys.readouterr().err


def test_model_is_needed(capsys):
    assert run.main(["--tasks", "piqa"]) == 2
    assert "--model is needed" in capsys.readouterr().err


def test_list_needs_no_model(mirror, capsys):
    assert run.main(["--list", "--tasks", "paper14", "--data", str(mirror.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert lines[0].split()[:3] == ["hellaswag", "hellaswag", "0?-shot"]
    assert lines[0].endswith("3 items  ready")
    assert "missing: no items of SaylorTwift/bbh" in lines[12]


def test_results_lie_beside_the_model_by_default(mirror, release):
    assert run.main(["--data", str(mirror.folder), "--model", str(release), "--tasks", "gsm8k"]) == 0
    assert (release.parent / "small-eval" / "results.json").is_file()
