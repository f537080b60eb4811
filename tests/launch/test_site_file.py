"""The site file: read by bash, checked, and the same keys as its example explains."""

import re
from pathlib import Path

import pytest

from launch import site_file
from mm_train.cli import UserError

EXAMPLE = Path(site_file.__file__).with_name("site.example.env")


def test_bash_reads_the_file_and_nothing_of_the_caller_leaks_in(tmp_path, monkeypatch):
    monkeypatch.setenv("MM_PARTITION", "of-the-caller")
    path = tmp_path / "site.env"
    path.write_text(
        "BASE=/images\nMM_CONTAINER_IMAGE=$BASE/mm.sqsh # a comment\nMM_NODES=4\nMM_QOS=\nNCCL_DEBUG=WARN\n"
    )
    site = site_file.read(path)
    assert site.values == {"MM_CONTAINER_IMAGE": "/images/mm.sqsh", "MM_NODES": "4"}
    assert (site.path, site.text("MM_PARTITION"), site.number("MM_NODES", 1), site.gpus_per_node) == (path, "", 4, 8)


def test_without_a_file_there_are_defaults(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MM_SITE", raising=False)
    assert site_file.read(None) == site_file.Site()
    (tmp_path / "launch").mkdir()
    (tmp_path / "launch/site.env").write_text("MM_GPUS_PER_NODE=0\nMM_TASKS_PER_NODE=2\n")
    assert site_file.read(None).processes_per_node == 2
    (tmp_path / "mine.env").write_text("MM_GPUS_PER_NODE=4\n")
    monkeypatch.setenv("MM_SITE", "mine.env")  # as the batch scripts, which get it from the same environment
    assert site_file.read(None).processes_per_node == 4


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("MM_PARTITON=gpu", "unknown key MM_PARTITON (did you mean MM_PARTITION?)"),
        ("MM_NODES=two", "MM_NODES is 'two'; it must be a whole number of at least 1"),
        ("MM_LAUNCHER=mpirun", "MM_LAUNCHER is 'mpirun'; it must be srun or torchrun"),
        ("MM_TIME=1day", "MM_TIME is '1day'; SLURM takes D-HH:MM:SS"),
        ("MM_NODES=2\nif then", "bash cannot read the site file"),
        ("exit 3", "bash cannot read the site file"),
    ],
)
def test_what_is_wrong_is_said_in_one_line(tmp_path, text, error):
    path = tmp_path / "site.env"
    path.write_text(text + "\n")
    with pytest.raises(UserError) as caught:
        site_file.read(path)
    assert error in str(caught.value)


def test_a_file_that_is_not_there():
    with pytest.raises(UserError, match=r"site file not found: none\.env"):
        site_file.read(Path("none.env"))


def test_the_example_explains_every_key_and_is_a_site_file(tmp_path):
    text = EXAMPLE.read_text()
    assert sorted(re.findall(r"^#(MM_\w+)=", text, re.MULTILINE)) == sorted(site_file.KEYS)
    path = tmp_path / "site.env"
    path.write_text(re.sub(r"^#(?=MM_|NCCL_|GLOO_)", "", text, flags=re.MULTILINE))
    assert set(site_file.read(path).values) == set(site_file.KEYS)


@pytest.mark.parametrize(
    ("text", "hours"),
    [
        ("90", 1.5),
        ("30:00", 0.5),
        ("02:30:00", 2.5),
        ("1-12", 36),
        ("2-00:30:00", 48.5),
        ("UNLIMITED", None),
        ("1day", None),
        ("", None),
    ],
)
def test_time_limits_as_slurm_writes_them(text, hours):
    assert site_file.slurm_hours(text) == hours
