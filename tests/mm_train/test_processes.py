import json
import os
import subprocess
import sys
from pathlib import Path

from mm_train.processes import LAUNCHER, beside, environment_alone, training_command

ROOT = Path(__file__).parents[2]


def test_the_training_command():
    assert training_command(["a.yaml", "b=1"], 1) == [sys.executable, "-m", "mm_train.train", "a.yaml", "b=1"]
    assert training_command(["a.yaml"], 3) == [sys.executable, "-m", "launch.local", "3", "a.yaml"]
    assert LAUNCHER.is_file()


def test_a_child_becomes_the_program_and_gives_way(tmp_path):
    """From another folder, as no rank, and in the same process: nothing stands between it and its parent."""
    code = (
        "import json, os, sys, mm_train; print(json.dumps([os.nice(0), os.getpid(), sys.argv[1:], dict(os.environ)]))"
    )
    child = subprocess.Popen(
        beside([sys.executable, "-c", code, "x y"], nice=3),
        cwd=tmp_path,
        env=environment_alone(MORE="1"),
        stdout=subprocess.PIPE,
        text=True,
    )
    nice, pid, words, environment = json.loads(child.communicate()[0])
    assert (pid, words) == (child.pid, ["x y"])
    assert nice == min(19, os.nice(0) + 3)
    assert environment["MORE"] == "1"


def test_a_child_is_no_rank_of_the_run(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "8")
    monkeypatch.setenv("PYTHONPATH", "/elsewhere")
    found = environment_alone()
    assert not {"RANK", "WORLD_SIZE"} & set(found)
    assert found["PYTHONPATH"] == os.pathsep.join([str(ROOT), "/elsewhere"])
