"""What launch.status makes of run folders, of chain.json and of SLURM's answers."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch import chain_checks, slurm_queue, status
from launch.slurm_queue import JobState
from tests.mm_train.test_recipe_state import first_done, recipe_files  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]
JOBS = ("first", "second", "export")


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))


@pytest.fixture
def chain(recipe_files, first_done, tmp_path):  # noqa: F811
    """Run folders of which the first stage is finished, and the record of a chain with hours for the second."""
    out = tmp_path / "runs"
    shutil.copytree(first_done, out)
    record = {
        "recipe": str(recipe_files / "recipe.yaml"),
        "overrides": ["second.train.tokens=5120"],
        "submitted": "2026-01-02T03:04:05+0000",
        "estimates": {"first": {"hours": 0.0}, "second": {"hours": 2.0}},
        "jobs": [
            {"name": name, "kind": "train", "job": str(number), "tasks": 0, "folder": str(out / name)}
            for number, name in enumerate(JOBS, start=11)
        ],
    }
    (out / chain_checks.RECORD).write_text(json.dumps(record))
    return out


@pytest.fixture
def answers(monkeypatch):
    """A function: what SLURM says of each job."""

    def say(**states: list[JobState]) -> None:
        by_id = {str(number): states.get(name, []) for number, name in enumerate(JOBS, start=11)}
        monkeypatch.setattr(slurm_queue, "is_here", lambda: True)
        monkeypatch.setattr(slurm_queue, "job_states", lambda job: by_id[job])

    return say


def row(out: str, name: str) -> str:
    (line,) = (line for line in out.splitlines() if line.startswith(name + " "))
    return line


def test_without_slurm_the_files_are_read(chain, capsys):
    assert status.main([str(chain)]) == 0
    out = capsys.readouterr().out
    assert "queued 2026-01-02T03:04:05+0000" in out
    assert row(out, "first").split()[:5] == ["first", "11", "?", "-", "3/3"]
    assert row(out, "first").split()[-1] == "done"
    assert "0/10" in row(out, "second")  # by the overrides of the record
    assert "~2:00:00" in row(out, "second")
    assert "left: 2:00:00" in out
    assert "SLURM is not installed here: states of jobs are not known" in out


def test_a_recipe_that_was_never_queued(recipe_files, tmp_path, capsys):  # noqa: F811
    assert status.main([str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "none")]) == 0
    out = capsys.readouterr().out
    assert "nothing was queued by launch.submit yet" in out
    assert "not started" in row(out, "second")


def test_progress_metrics_and_time_left_of_a_stage_that_runs(chain, answers, capsys):
    second = chain / "second"
    second.mkdir()
    run = {"kind": "run", "stage": "second", "total_steps": 10, "global_batch_tokens": 512}
    steps = [
        {"kind": "train", "step": n, "tokens": 512 * n, "loss": 5.0 - n / 10, "tokens_per_second": 51.2, "mfu": 0.41}
        for n in (1, 2, 3, 4)
    ]
    (second / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [run, *steps]))
    answers(
        first=[JobState("11", None, "COMPLETED", "None", 0, "node1", "0:0")],
        second=[JobState("12", None, "RUNNING", "None", 3, "node[1-2]", "0:0")],
        export=[JobState("13", None, "PENDING", "Dependency", 0, "", "0:0")],
    )
    assert status.main([str(chain)]) == 0
    out = capsys.readouterr().out
    line = row(out, "second").split()
    assert line[:5] == ["second", "12", "RUNNING", "3", "4/10"]
    assert line[5:9] == ["4.600", "51.2", "41.0%", "01:00"]  # 6 steps of 512 tokens at 51.2 a second
    assert "starting" in row(out, "second")  # no heartbeat yet
    assert "PENDING (Dependency)" in row(out, "export")
    assert "left: 01:00" in out


def test_why_a_stage_failed(chain, answers, capsys):
    folder = chain / "second/slurm"
    folder.mkdir(parents=True)
    (folder / "summary.log").write_text("go on\nrank 3 on node2 failed\n    error: damaged shard x\nnot requeued\n\n")
    answers(
        second=[JobState("12", None, "FAILED", "NonZeroExitCode", 1, "node1", "2:0")],
        export=[JobState("13", None, "CANCELLED", "DependencyNeverSatisfied", 0, "", "0:0")],
    )
    assert status.main([str(chain)]) == 0
    out = capsys.readouterr().out
    assert f"second failed: job 12, FAILED, exit 2:0: error: damaged shard x ({folder}/summary.log)" in out
    assert "export failed" not in out


def test_a_folder_without_a_record(tmp_path, capsys):
    assert status.main([str(tmp_path)]) == 2
    assert "has no chain.json" in capsys.readouterr().err
    assert status.main([str(tmp_path / "none")]) == 2
    assert "neither a recipe nor a folder" in capsys.readouterr().err


def test_tasks_of_an_array_are_counted():
    waiting = JobState("7", "3,5-7%2", "PENDING", "Resources", 0, "", "0:0")
    running = JobState("7", "2", "RUNNING", "None", 0, "node1", "0:0")
    assert (waiting.count, running.count) == (4, 1)
    assert status.slurm_said([running, waiting]) == "4 PENDING, 1 RUNNING"
    assert status.slurm_said([JobState("8", None, "PENDING", "Priority", 0, "", "0:0")]) == "PENDING (Priority)"


def test_what_scontrol_prints_is_read():
    line = "JobId=8 ArrayJobId=7 ArrayTaskId=2 JobName=a b JobState=PENDING Reason=Priority Restarts=1 NodeList=(null)"
    assert slurm_queue.fields(line)["JobState"] == "PENDING"
    assert slurm_queue.complaint("sbatch: error: Batch job submission failed: Invalid qos\n") == "Invalid qos"
    assert slurm_queue.complaint("scontrol: fatal: no\n") == "fatal: no"


@pytest.mark.parametrize("module", ["submit", "status"])
def test_a_login_node_needs_no_torch(module):
    code = f"import sys, launch.{module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=dict(os.environ), timeout=120).returncode == 0
