"""What a launcher knows of a run before it starts it, and the copy of the code that a job keeps."""

import json
import subprocess
from pathlib import Path

import pytest

from launch import resolved, snapshot
from mm_train import config
from mm_train.cli import UserError

ROOT = Path(__file__).parents[2]


@pytest.fixture
def words(small_config, tmp_path):
    config.save(small_config, tmp_path / "cfg.yaml")
    return [str(tmp_path / "cfg.yaml")]


def test_it_says_where_the_run_is_and_keeps_the_configuration(words, small_config, tmp_path, capsys):
    assert resolved.main(["1", "config-7.yaml", *words]) == 0
    assert json.loads(capsys.readouterr().out) == {"run_dir": str(tmp_path / "run"), "hang_seconds": 1800}
    kept = tmp_path / "run/slurm/config-7.yaml"
    assert config.load([kept]) == small_config
    assert resolved.main(["1", "config-7.yaml", *words, "optim.lr=0.5"]) == 0
    assert config.load([kept]) == small_config, "a job that is started again goes on as it began"


@pytest.mark.parametrize(
    ("world", "more", "message"),
    [
        ("3", "optim.lr=1e-3", "train.global_batch_tokens (512) must be a multiple of"),
        ("2", "parallel.expert_parallel=4", "expert_parallel"),
        ("1", "optim.lrr=1", "did you mean optim.lr?"),
        ("1", "data.path=/no/data", "data.path /no/data: no such folder on this node"),
        ("1", "run.dir=/proc/run", "cannot write the run folder /proc/run"),
    ],
)
def test_what_cannot_be_trained_is_refused(words, world, more, message, capsys):
    assert resolved.main([world, "config-7.yaml", *words, more]) == 2
    assert message in capsys.readouterr().err


def project(folder: Path) -> Path:
    for name in ("mm_train/train.py", "launch/local.sh", "mm_train/notes.txt", "data/big.bin"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


def git(folder: Path, *words: str) -> None:
    who = ["-c", "user.name=a", "-c", "user.email=a@b.c"]
    subprocess.run(["git", "-C", folder, *who, *words], check=True, capture_output=True)


def test_a_snapshot_has_what_git_would_have_and_says_of_which_commit(tmp_path):
    root = project(tmp_path / "project")
    (root / ".gitignore").write_text("notes.txt\n")
    git(root, "init")
    git(root, "add", "mm_train/train.py")
    git(root, "commit", "-m", "one")
    (root / "mm_train/train.py").write_text("edited")
    code = snapshot.take(root, tmp_path / "code")
    assert sorted(str(p.relative_to(code)) for p in code.rglob("*") if p.is_file()) == [
        "COMMIT",
        "launch/local.sh",
        "mm_train/train.py",
    ]
    assert (code / "mm_train/train.py").read_text() == "edited"
    assert (code / "COMMIT").read_text().endswith(" and changes\n")
    (root / "mm_train/train.py").write_text("edited again")
    assert (snapshot.take(root, code) / "mm_train/train.py").read_text() == "edited", "it is taken once"


def test_a_snapshot_without_git_and_one_that_cannot_be_written(tmp_path, monkeypatch):
    root = project(tmp_path / "project")
    monkeypatch.setenv("PATH", "")
    code = snapshot.take(root, tmp_path / "code")
    assert (code / "mm_train/notes.txt").exists()
    assert (code / "COMMIT").read_text() == "unknown\n"
    with pytest.raises(UserError, match="cannot write the run folder"):
        snapshot.take(root, Path("/proc/code"))
