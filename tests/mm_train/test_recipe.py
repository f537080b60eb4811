"""The command: a chain that is run, stopped and gone on with, and what it refuses."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from mm_train import recipe
from mm_train.metrics import read_metrics
from mm_train.recipe_plan import load
from mm_train.stopping import STOPPED
from mm_train.train import train
from tests.mm_train.test_recipe_state import first_done, recipe_files  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(recipe_files, tmp_path):  # noqa: F811
    """A function: the command's words for the shared recipe, in a folder of the test's own."""
    return lambda *more: [str(recipe_files / "recipe.yaml"), *more, "--out", str(tmp_path / "runs")]


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run)["train"]]


def test_a_chain_is_stopped_goes_on_and_equals_its_stages_by_hand(words, recipe_files, tmp_path, capsys):  # noqa: F811
    """By SIGTERM to the command, which reaches the stage under way: that saves, and nothing is trained twice."""
    command = [sys.executable, "-m", "mm_train.recipe", *words("second.train.tokens=8192")]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    for line in process.stdout:
        if "step  2/16" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.stdout.read()
    assert process.wait() == STOPPED
    assert "stopped at: training: second; the same command goes on from there" in rest

    assert recipe.main(words("second.train.tokens=8192", "--status")) == 0
    first, second = (line.split() for line in capsys.readouterr().out.splitlines()[2:4])
    assert (first[0], first[4]) == ("first", "done")
    assert (second[0], second[4]) == ("second", "stopped")
    assert recipe.main(words("second.train.tokens=8192")) == 0
    assert "nothing is left to do" in capsys.readouterr().out

    out = tmp_path / "runs"
    assert (out / "export/config.json").is_file()
    by_hand = load(recipe_files / "recipe.yaml", str(tmp_path / "by-hand"), ["second.train.tokens=8192"])
    for stage in by_hand.stages:
        train(stage.config)
        assert losses(out / stage.name) == losses(stage.run_dir)


@pytest.mark.slow
def test_two_processes_and_a_data_set_that_is_prepared_first(tmp_path, monkeypatch):
    """The quickstart's recipe, shortened: data_prep, two ranks a stage, context 256 -> 512."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    short = ["train.tokens=16384", "optim.warmup_steps=1", "train.validation_tokens=4096", "log.wandb=disabled"]
    command = [sys.executable, "-m", "mm_train.recipe", "configs/recipe/tiny.yaml", *short, "--prepare"]
    command += ["--processes", "2", "parallel.expert_parallel=2"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "runs/tiny/export/model.safetensors").is_file()
    facts = [read_metrics(tmp_path / f"runs/tiny/{name}")["run"][-1] for name in ("pretrain", "midtrain", "sft", "qat")]
    assert [(f["world"], f["seq_len"]) for f in facts] == [(2, 256), (2, 512), (2, 512), (2, 512)]


@pytest.fixture
def halfway(first_done, tmp_path):  # noqa: F811
    shutil.copytree(first_done, tmp_path / "runs")
    return tmp_path / "runs"


def test_a_dry_run_says_what_would_be_run_and_does_nothing(words, halfway, capsys):
    before = sorted(halfway.rglob("*"))
    assert recipe.main(words("--dry-run", "--processes", "2", "parallel.zero_stage=0")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "next: training: second" in lines
    training, export = lines[-2:]
    assert training.startswith("python -m launch.local 2 ")
    assert training.endswith(f"init_from={halfway / 'first'}")
    assert export.startswith(f"python -m mm_train.export --checkpoint {halfway / 'second'} --out {halfway / 'export'}")
    assert sorted(halfway.rglob("*")) == before


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--stage", "second"], "stage second starts from {out}/first, which is not finished (stopped, 3/3 steps)"),
        (["--stage", "third"], "no stage 'third' in recipe recipe; it has first, second"),
        (["--stage", "first", "--until", "second"], "--stage and --until exclude each other"),
        (["--processes", "0"], "--processes is 0; it must be at least 1"),
        (["first.optim.lr=1e-3"], "first was begun with another configuration: optim.lr 0.0004 (now 0.001); remove"),
        (["oprim.lr=1"], "stage first: override 'oprim.lr=1': unknown key oprim (did you mean optim?)"),
    ],
)
def test_what_cannot_be_done_is_one_line(words, halfway, capsys, more, message):
    (halfway / "first/DONE").unlink()
    assert recipe.main(words(*more)) == 2
    error = capsys.readouterr().err
    assert message.format(out=halfway) in error
    assert error.count("\n") == 1


def test_a_failing_stage_ends_the_chain_with_its_status(words, halfway, capfd):
    assert recipe.main(words("second.data.path=nowhere")) == 2
    error = capfd.readouterr().err
    assert "error: data set folder not found: nowhere" in error
    assert "recipe stopped at: training: second" in error
    assert not (halfway / "export").exists()


def test_data_that_is_not_prepared_is_said_with_the_command(recipe_files, tmp_path, monkeypatch, capsys):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data.yaml").write_text("out: data/set\n")
    text = (
        (recipe_files / "recipe.yaml").read_text().replace("first.yaml", f"first.yaml\n    data: {tmp_path}/data.yaml")
    )
    (tmp_path / "with-data.yaml").write_text(text)
    command = [str(tmp_path / "with-data.yaml"), "--out", str(tmp_path / "runs")]
    assert recipe.main([*command, "first.data.path=data/set"]) == 2
    assert f"data set data/set is not prepared: python -m data_prep.run {tmp_path}/data.yaml" in capsys.readouterr().err
    assert recipe.main([*command, "first.data.path=data/set", "--prepare", "--dry-run"]) == 0
    assert f"python -m data_prep.run {tmp_path}/data.yaml" in capsys.readouterr().out.splitlines()
    assert recipe.main([*command, "first.data.path=other"]) == 2
    assert "stage first reads data.path=other, but" in capsys.readouterr().err
