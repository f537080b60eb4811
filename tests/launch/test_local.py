"""launch/local.sh: N processes, one clear error, the exit status of the first that fails."""

import subprocess
from pathlib import Path

import pytest

from mm_train import config
from mm_train.metrics import read_metrics

ROOT = Path(__file__).parents[2]


def local(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch/local.sh", *args], capture_output=True, text=True)


@pytest.mark.parametrize("args", [(), ("two",), ("0", "x.yaml")])
def test_without_a_number_of_processes_it_explains_itself(args):
    done = local(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh NUM_PROCESSES")


def test_an_error_of_all_ranks_is_told_once():
    done = local("2", "configs/model/tiny.yaml", "optim.lrr=1")
    assert done.returncode == 2
    assert done.stderr == "error: override 'optim.lrr=1': unknown key optim.lrr (did you mean optim.lr?)\n"


def test_two_processes_train_together(small_config, tmp_path):
    small_config.parallel.expert_parallel = 2
    small_config.train.tokens = 2 * 512
    small_config.optim.warmup_steps = 1
    config.save(small_config, tmp_path / "cfg.yaml")
    done = local("2", str(tmp_path / "cfg.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    records = read_metrics(small_config.run.dir)
    assert records["run"][0]["world"] == records["run"][0]["expert_parallel"] == 2
    assert records["train"][-1]["step"] == 2
