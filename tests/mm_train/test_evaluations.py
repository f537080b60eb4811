"""Checkpoints scored beside training: by eval.run itself, and by programs that fail, hang or take their time."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mm_train import config, evaluations
from mm_train.checkpoint.folders import held, hold
from mm_train.cli import UserError
from mm_train.evaluations import Evaluations
from mm_train.fault_run import alive
from mm_train.metrics import Metrics, read_metrics
from mm_train.run_folder import read_stage
from mm_train.train import train
from tests.eval.conftest import mirror, wheel_folder  # noqa: F401 - fixtures

# In place of eval.run: says what it was told, in results.json; what comes before is what it does first.
PROGRAM = """
import json, os, sys, time
from pathlib import Path
words = dict(zip(sys.argv[1::2], sys.argv[2::2]))
{first}
assert Path(words["--model"], "manifest.json").is_file(), "the checkpoint is gone"
found = {{"tasks": {{"piqa": {{"score": 0.5}}, "nq": {{"score": None}}}}, "average": 0.5, "limit": 7}}
Path(words["--out"], "results.json").write_text(json.dumps(found | {{"words": words, "nice": os.nice(0)}}))
"""


def program(first: str = "") -> list[str]:
    return [sys.executable, "-c", PROGRAM.format(first=first)]


@pytest.fixture
def run_of(small_config, monkeypatch):
    """A function: train with this program in place of eval.run; returns the records of the run by kind."""

    def run(first: str = "", **overrides) -> dict:
        small_config.evaluate = config.Evaluate(every=4, tasks="early", limit=7, **overrides)
        small_config.checkpoint.keep = 1
        plain = Evaluations.__init__
        monkeypatch.setattr(Evaluations, "__init__", lambda self, *args: plain(self, *args, program(first)))
        assert train(small_config) == 0
        return read_metrics(small_config.run.dir)

    return run


def test_eval_run_scores_the_checkpoints_of_a_run(small_config, mirror):  # noqa: F811
    small_config.evaluate = config.Evaluate(every=8, tasks="piqa,boolq", limit=2, data=str(mirror.folder))
    assert train(small_config) == 0
    run = Path(small_config.run.dir)
    records = read_metrics(run)
    (record,) = records["evaluation"]
    results = json.loads((run / "eval/step-00000008/results.json").read_text())
    assert record["step"] == 8
    assert record["scores"] == {name: results["tasks"][name]["score"] for name in ("piqa", "boolq")}
    assert record["bits_per_byte"] == {name: results["tasks"][name]["bits_per_byte"] for name in ("piqa", "boolq")}
    assert (record["average"], record["limit"]) == (results["average"], 2)
    assert read_stage(run).named["evaluation/piqa"] == ([8 * 512], [record["scores"]["piqa"]])
    assert read_stage(run).named["evaluation_bits/piqa"] == ([8 * 512], [record["bits_per_byte"]["piqa"]])
    assert "evaluation (2 items each)  average" in (run / "train.log").read_text()
    assert held(run) == []


def test_training_is_the_same_with_and_without(small_config, run_of, tmp_path):
    records = run_of()
    found = json.loads(next((Path(small_config.run.dir) / "eval").glob("*/results.json")).read_text())
    assert found["nice"] >= evaluations.NICE
    assert found["words"]["--tasks"] == "early"
    assert records["evaluation"][0]["scores"] == {"piqa": 0.5}  # what has no score is left out
    small_config.evaluate = config.Evaluate()
    small_config.run.dir = str(tmp_path / "without")
    assert train(small_config) == 0
    without = read_metrics(small_config.run.dir)
    assert [r["loss"] for r in records["train"]] == [r["loss"] for r in without["train"]]


def test_a_checkpoint_stays_while_it_is_read_and_there_is_one_evaluation_at_a_time(small_config, run_of):
    """With checkpoint.keep=1 that of step 4 would go when that of step 8 is there."""
    go = Path(small_config.run.dir).with_name("go")
    wait = f"while not Path({str(go)!r}).exists(): time.sleep(0.05)"
    saved = Evaluations.finish

    def finish(self, *args):
        root = Path(small_config.run.dir) / "checkpoints"
        assert {path.name for path in root.glob("step-????????")} == {"step-00000004", "step-00000012"}
        go.touch()
        saved(self, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Evaluations, "finish", finish)
        records = run_of(wait)
    assert [r["step"] for r in records["evaluation"]] == [4]
    assert [r["text"] for r in records["alert"] if r["title"] == "evaluation"] == [
        f"step {step} is not evaluated: that of step 4 is not ready" for step in (8, 12)
    ]
    assert held(Path(small_config.run.dir)) == []


def make(cfg: config.Config, first: str = "") -> Evaluations:
    """Evaluations of a run without the training, at its step 4."""
    run = Path(cfg.run.dir)
    cfg.evaluate = config.Evaluate(every=4, tasks="early", limit=7)
    for step in (4, 8, 12):
        (run / f"checkpoints/step-{step:08d}").mkdir(parents=True, exist_ok=True)
        (run / f"checkpoints/step-{step:08d}/manifest.json").touch()
    metrics = Metrics(run, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    return Evaluations(cfg, metrics, True, program(first))


@pytest.mark.parametrize(
    ("first", "text"),
    [
        ("sys.exit('error: no such suite')", "that of step 4 failed with status 1: error: no such suite"),
        ("os.kill(os.getpid(), 9)", "that of step 4 failed with status -9: it said nothing"),
        ("Path(words['--out'], 'results.json').write_text('{'); sys.exit(0)", "left no results that can be read"),
        ("time.sleep(100)", "that of step 4 took too long for the end of the run: python -m eval.run --model "),
    ],
)
def test_a_failure_is_an_alert_and_no_more(small_config, monkeypatch, first, text):
    monkeypatch.setattr(evaluations, "END_SECONDS", 0.3 if "sleep" in first else 60)
    run, failing = Path(small_config.run.dir), make(small_config, first)
    hold(run / "checkpoints/step-00000004")
    failing.look(4, run / "checkpoints/step-00000004")
    failing.finish(5, lambda: None)
    records = read_metrics(run)
    assert text in records["alert"][0]["text"]
    assert "evaluation" not in records
    assert held(run) == []


def test_a_program_that_does_not_start_is_an_alert(small_config):
    failing = make(small_config)
    (Path(small_config.run.dir) / "eval").touch()
    failing.look(4, Path(small_config.run.dir) / "checkpoints/step-00000004")
    assert "that of step 4 does not start" in read_metrics(small_config.run.dir)["alert"][0]["text"]


def test_what_a_killed_run_left_is_done_when_it_goes_on(small_config):
    later, run = make(small_config), Path(small_config.run.dir)
    for step in (4, 8):
        hold(run / f"checkpoints/step-{step:08d}")
    later.resume(12)
    assert [folder.name for folder in held(run)] == ["step-00000008"]  # the newest; of the others there will be more
    later.finish(12, lambda: None)
    assert [r["step"] for r in read_metrics(run)["evaluation"]] == [8]
    hold(run / "checkpoints/step-00000012")
    later.cfg.evaluate.every = 0
    later.resume(12)
    assert held(run) == []


def test_it_ends_with_training_whatever_ends_that(small_config):
    """SIGKILL of the parent, as by an out-of-memory killer."""
    folder = Path(small_config.run.dir) / "checkpoints/step-00000004"
    folder.mkdir(parents=True)
    config.save(small_config, folder.parent.parent / "config.yaml")
    note = folder.parent / "pid"
    first = f"Path({str(note)!r}).write_text(str(os.getpid())); time.sleep(100)"
    code = (
        "import sys, time; from pathlib import Path; from mm_train import config\n"
        "from tests.mm_train.test_evaluations import make\n"
        f"cfg = config.load([{str(folder.parent.parent / 'config.yaml')!r}])\n"
        f"make(cfg, {first!r}).look(4, Path({str(folder)!r}))\ntime.sleep(100)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2])
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    child = int(note.read_text())
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    while alive(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(child)


def test_steps_without_a_checkpoint_are_refused(small_config):
    small_config.evaluate.every = 6
    with pytest.raises(UserError, match=r"evaluate.every \(6\) must be a multiple of checkpoint.every \(4\)"):
        config.validate(small_config)
