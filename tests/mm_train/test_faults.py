"""A run that is killed again and again ends like one that was not; and the test of that would notice if it did not."""

import dataclasses
import hashlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_train import config, faults
from mm_train.checkpoint.folders import complete
from mm_train.checkpoint.format import read_manifest, write_manifest
from mm_train.fault_report import Outcome, blow_line, compare_checkpoints, compare_logs, report_lines
from mm_train.fault_run import Attempt, Timing, end_of_lines, newest_intact, partials

ROOT = Path(__file__).parents[2]


@pytest.fixture
def cfg_file(small_config, tmp_path) -> Path:
    """A run of 40 steps with a checkpoint every 2 and two validations."""
    small_config.train.tokens = 40 * 512
    small_config.train.validate_every = 25
    small_config.train.validation_tokens = 512
    small_config.checkpoint.every = 2
    small_config.run.dir = ""
    config.save(small_config, tmp_path / "cfg.yaml")
    return tmp_path / "cfg.yaml"


def break_it(tmp_path: Path, *args: object) -> tuple[int, dict]:
    """Run the command; returns its exit status and faults.json."""
    status = faults.main([*map(str, args), "--out", str(tmp_path / "faults")])
    return status, json.loads((tmp_path / "faults" / "faults.json").read_text())


def test_one_process_killed_four_times_and_stopped_once(cfg_file, tmp_path, capsys):
    """With this seed the last blow is at step 18 of 40: the run has not ended before, however slow who strikes is."""
    args = ("--kills", 4, "--stops", 1, "--during-writes", 0.5, "--seed", 1)
    status, outcome = break_it(tmp_path, cfg_file, *args)
    output = capsys.readouterr().out
    assert status == 0, output
    assert [blow["status"] for blow in outcome["blows"] if blow["kind"] != "stop"] == [137] * 4
    assert outcome["starts"] == 6
    assert outcome["steps_done"] >= 40
    assert "bit for bit" in output


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize(
    "args",
    [
        ("--kills", 40, "--stops", 2, "--seed", 1),
        ("--kills", 20, "--stops", 2, "--hangs", 2, "--seed", 2, "--ranks", 2, "parallel.expert_parallel=2"),
    ],
    ids=["one process", "two ranks, EP 2"],
)
def test_sixty_kills(cfg_file, tmp_path, args, capsys):
    """Prints the tables: they belong into docs/log.md."""
    status, outcome = break_it(tmp_path, cfg_file, f"train.tokens={120 * 512}", *args)
    with capsys.disabled():
        print("\n" + capsys.readouterr().out)
    assert status == 0
    kills = [blow for blow in outcome["blows"] if blow["kind"] not in ("hang", "stop")]
    assert len(kills) == args[1]
    assert sum(blow["left_partial"] for blow in kills) >= args[1] / 6


# --- the plan ---------------------------------------------------------------------------------------------------------


def options(**values) -> Namespace:
    usual = {"kills": 60, "hangs": 2, "stops": 4, "during_writes": 0.3, "ranks": 2, "seed": 0}
    return Namespace(**usual | values)


def test_the_plan_has_what_was_asked_for_in_the_order_of_the_run(small_config):
    small_config.train.tokens = 100 * 512
    blows = faults.plan(options(), small_config)
    kinds = [blow.kind for blow in blows]
    assert [kinds.count(kind) for kind in ("write", "start", "kill", "hang", "stop")] == [18, 4, 38, 2, 4]
    places = [blow.place for blow in blows]
    assert places == sorted(places)
    assert 0 <= places[0] < places[-1] <= 97
    assert all(blow.place % small_config.checkpoint.every == 0 for blow in blows if blow.kind == "write")
    assert {blow.target for blow in blows if blow.is_kill} == {"one", "all", "launcher"}
    assert {blow.rank for blow in blows} == {0, 1}
    assert {blow.signal for blow in blows if blow.kind == "stop"} <= {signal.SIGTERM, signal.SIGUSR1}
    assert faults.plan(options(), small_config) == blows
    assert faults.plan(options(seed=1), small_config) != blows


def test_one_process_has_no_launcher(small_config):
    blows = faults.plan(options(ranks=1, hangs=0), small_config)
    assert {blow.target for blow in blows if blow.is_kill} == {"one"}


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--kills", "-1"], "--kills is -1; it must be at least 0"),
        (["--during-writes", "30"], "--during-writes is 30.0; it is a share, from 0 to 1"),
        (["--hangs", "1"], "--hangs needs --ranks 2 or more"),
        (["train.tokens=1024", "optim.warmup_steps=1"], "the run has 2 steps and a checkpoint every 2"),
        (["checkpoint.every=38"], "the run has 40 steps and a checkpoint every 38"),
        (["optim.lrr=1"], "unknown key optim.lrr"),
        (
            ["--ranks", "2", "parallel.expert_parallel=4"],
            "parallel.expert_parallel (4) must divide the number of processes (2)",
        ),
        (["--ranks", "3"], "train.global_batch_tokens (512) must be a multiple of"),
    ],
)
def test_what_cannot_work_is_one_line(cfg_file, tmp_path, capsys, args, message):
    assert faults.main([str(cfg_file), *args, "--out", str(tmp_path / "out")]) == 2
    errors = capsys.readouterr().err
    assert message in errors
    assert errors.count("\n") == 1


def test_a_folder_with_something_in_it_is_left_alone(cfg_file, tmp_path, capsys):
    (tmp_path / "cfg.txt").touch()
    assert faults.main([str(cfg_file), "--out", str(tmp_path)]) == 2
    assert f"--out {tmp_path} is not empty" in capsys.readouterr().err
    assert (tmp_path / "cfg.txt").exists()


def test_every_step_is_logged_and_a_hang_is_found_soon(cfg_file, tmp_path):
    args = options(configs=[str(cfg_file), "log.every=5"], out=tmp_path / "out")
    cfg, words = faults.prepare(args)
    assert (cfg.log.every, cfg.log.wandb, cfg.faults.hang_seconds) == (1, "disabled", faults.HANG_SECONDS)
    assert config.load_words([*words, "run.dir=x"]) == dataclasses.replace(cfg, run=config.Run(dir="x"))
    args.configs.append("faults.hang_seconds=7")
    assert faults.prepare(args)[0].faults.hang_seconds == 7


# --- what is seen of a run --------------------------------------------------------------------------------------------


def record(**values) -> str:
    return json.dumps({"kind": "train", "loss": 2.0, "lr": 0.1} | values) + "\n"


def test_a_torn_line_of_the_log_is_not_read(tmp_path):
    file = tmp_path / "metrics.jsonl"
    assert end_of_lines(file) == 0
    file.write_text(record(step=1) + '{"kind": "tr')
    assert end_of_lines(file) == len(record(step=1))


def test_a_process_is_followed_by_its_log_and_leaves_nothing(tmp_path, monkeypatch):
    """A stand-in that logs like training: what came before, and torn lines, are not taken for its steps."""
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text(record(step=9) + '{"torn')
    code = (
        "import json, os, sys, time\nf = open('metrics.jsonl', 'r+'); f.truncate(int(sys.argv[1])); f.seek(0, 2)\n"
        "def log(**r): print(json.dumps(r), file=f, flush=True)\n"
        "log(kind='run', first_step=4); log(kind='train', step=5); print('hello', flush=True)\n"
        "os.mkdir('checkpoints/step-00000006.partial')\nos.mkdir('checkpoints/step-00000004.partial/x')\ntime.sleep(60)"
    )
    start = subprocess.Popen
    cut = str(end_of_lines(tmp_path / "metrics.jsonl"))
    monkeypatch.setattr(
        subprocess, "Popen", lambda _, **how: start([sys.executable, "-c", code, cut], **how | {"cwd": tmp_path})
    )
    attempt = Attempt([], 1, tmp_path, tmp_path / "log")
    deadline = time.monotonic() + 20
    while attempt.look() and 6 not in attempt.writing() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert attempt.writing() == [4, 6]  # begun anew, and new
    assert set(partials(tmp_path)) == {4, 6}
    assert (attempt.first_step, attempt.step) == (4, 5)
    assert attempt.first_step_seconds > 0
    assert attempt.all_ranks() == {0: attempt.process.pid}
    os.kill(attempt.process.pid, signal.SIGSTOP)
    assert not attempt.wait(0.05)
    attempt.kill()
    assert attempt.wait(5)
    assert attempt.status == 137
    assert attempt.output() == "hello"


# --- the comparison ---------------------------------------------------------------------------------------------------


def logs(tmp_path: Path, lines: str) -> tuple[Path, Path]:
    for name, text in (("a", record(step=1, seconds=1.0) + record(step=2, loss=1.5)), ("b", lines)):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"kind": "run"}\n' + text + '{"torn')
    return tmp_path / "a", tmp_path / "b"


@pytest.mark.parametrize(
    ("lines", "problems"),
    [
        (record(step=1, seconds=9.0) + record(step=1) + record(step=2, loss=1.5), []),
        (record(step=1), ["1 records are missing in the log, the first is train, step 2"]),
        (
            record(step=1) + record(step=2, loss=math.nextafter(1.5, 2)) + record(step=2, loss=1.5),  # mended: too late
            ["train, step 2: loss differ: 1.5000000000000002 instead of 1.5"],
        ),
        (record(step=1, lr=0.2) + record(step=2, loss=1.5), ["train, step 1: lr differ: 0.2 instead of 0.1"]),
        (
            record(step=1, new=[1]) + record(step=2, loss=1.5),  # keys that nobody has thought of yet
            ["train, step 1: new differ: [1] instead of None"],
        ),
        (
            record(step=1) + record(step=2, loss=1.5) + record(step=3),
            ["train, step 3: not in the log of the undisturbed run"],
        ),
        (
            record(step=1) + record(step=2, loss=1.5) + record(kind="skipped", step=2),
            ["skipped, step 2: not in the log of the undisturbed run"],
        ),
    ],
)
def test_logs_are_compared_to_the_last_bit(tmp_path, lines, problems):
    assert compare_logs(*logs(tmp_path, lines)) == problems


def test_validations_are_compared_by_source_and_a_rollbacks_steps_with_both(tmp_path):
    held_out = [record(kind="validation", step=0, source=s, loss=9.0) for s in ("code", "chat")]
    twice = record(step=1, loss=2.5) + record(step=2, loss=9.5)  # before the rollback; the data was other data
    reference, broken = logs(tmp_path, "".join(held_out) + twice + record(step=1) + record(step=2, loss=1.5))
    (reference / "metrics.jsonl").write_text((broken / "metrics.jsonl").read_text())
    assert compare_logs(reference, broken) == []
    (broken / "metrics.jsonl").write_text(record(kind="validation", step=0, source="chat", loss=9.5) + twice)
    assert compare_logs(reference, broken) == [
        "validation of chat, step 0: loss differ: 9.5 instead of 9.0",
        "1 records are missing in the log, the first is validation of code, step 0",
    ]


def test_many_differences_are_told_in_short(tmp_path):
    problems = compare_logs(*logs(tmp_path, "".join(record(step=2, loss=float(i)) for i in range(30))))
    assert len(problems) == 6
    assert problems[-1] == "and 26 more like it"


@pytest.fixture(scope="module")
def trained(small_model, data_set, tmp_path_factory) -> Path:
    """A run of 4 steps with checkpoints of steps 2 and 4."""
    from mm_train.train import train

    cfg = config.Config(model=small_model)
    cfg.data = config.Data(path=str(data_set), mixture={"code": 1}, seq_len=64)
    cfg.train = config.Train(tokens=4 * 512, global_batch_tokens=512, micro_batch_size=4)
    cfg.optim = config.Optim(warmup_steps=1)
    cfg.checkpoint.every = 2
    cfg.log = config.Log(wandb="disabled")
    cfg.run.dir = str(tmp_path_factory.mktemp("run"))
    train(cfg)
    return Path(cfg.run.dir)


def test_a_damaged_checkpoint_is_not_the_newest_and_a_problem(trained, tmp_path):
    assert newest_intact(tmp_path) == (0, [])
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoints" / "step-00000006.partial").mkdir()
    assert newest_intact(run) == (4, [])
    file = next(complete(run)[0].glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    step, wrong = newest_intact(run)
    assert step == 2
    assert len(wrong) == 1
    assert "step-00000004" in wrong[0]


def test_checkpoints_are_compared_to_the_last_bit(trained, tmp_path):
    other = shutil.copytree(trained, tmp_path / "other")
    assert compare_checkpoints(trained, other) == []
    assert compare_checkpoints(trained, tmp_path) == ["the last checkpoints are step-00000004 and no checkpoint"]
    change_one_bit(complete(other)[0], "exp_avg/model.embed_tokens.weight")
    assert compare_checkpoints(trained, other) == ["exp_avg of model.embed_tokens.weight: 1 of 32768 elements differ"]
    shutil.rmtree(complete(other)[0])
    assert compare_checkpoints(trained, other) == ["the last checkpoints are step-00000004 and step-00000002"]


def change_one_bit(folder: Path, key: str) -> None:
    """The last bit of one number of a checkpoint, and its hashes with it."""
    manifest = read_manifest(folder)
    for file in manifest["files"]:
        path = folder / file["file"]
        tensors = load_file(path)
        stored = next((name for name in tensors if name == key or name.startswith(key)), None)
        if stored is None:
            continue
        tensors[stored].view(torch.int32).view(-1)[7] ^= 1
        save_file(tensors, path, {"format": "pt"})
        file |= {"sha256": hashlib.sha256(path.read_bytes()).hexdigest(), "bytes": path.stat().st_size}
    write_manifest(folder, {name: value for name, value in manifest.items() if name != "sha256"})


def test_the_table_says_what_was_done_and_what_is_wrong(small_config):
    blows = faults.plan(options(kills=3, hangs=1, stops=1, during_writes=0.4), small_config)
    for blow in blows:
        blow.seconds, blow.struck_after, blow.left_partial = 2.0, int(blow.place), blow.kind == "write"
    outcome = Outcome(["x"], 2, 0, 12, Timing(0.1, 0.25, 5.0), 65.0, 130.0, 6, [5.0, 7.0], 20, blows)
    text = re.sub(" +", " ", "\n".join(report_lines(outcome)))
    for part in (
        "kills (SIGKILL)",
        "1 (half of one",
        "1, ended by the watchdog after 2.0 s",
        "1, saved and left after 2.0 s",
        "restarts 5",
        "12, and 8 done again",
        "0.250 s",
        "02:10, undisturbed 01:05",
        "bit for bit",
    ):
        assert part in text
    outcome.problems = ["step 2: loss differ"]
    assert "DIFFERENT" in "\n".join(report_lines(outcome))
    assert report_lines(outcome)[-1] == "problem: step 2: loss differ"
    assert " after step " in blow_line(1, blows[0])
