"""Two gloo ranks with expert parallelism against one plain process: same losses, gradients, weights; one launch."""

import dataclasses
import json
import os
import subprocess
from pathlib import Path

import pytest

from mm_train import config
from mm_train.cli import UserError
from mm_train.parallel import init_groups

ROOT = Path(__file__).parents[2]


def torchrun(python: str, *args: str, ranks: int) -> subprocess.CompletedProcess:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *args]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


@pytest.fixture(scope="module")
def compare(small_model, data_set, tmp_path_factory, python):
    """A function that runs parallel_worker.py and returns its report."""

    def run(ranks: int, steps: int, parallel: config.Parallel, *dispatches: str) -> dict:
        folder = tmp_path_factory.mktemp("parallel")
        cfg = configure(small_model, data_set, steps, parallel)
        cfg.run.dir = str(folder / "run")
        config.save(cfg, folder / "config.yaml")
        files = [str(folder / "config.yaml"), str(folder / "report.json")]
        done = torchrun(python, "tests/mm_train/parallel_worker.py", *files, *dispatches, ranks=ranks)
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads((folder / "report.json").read_text())

    return run


def configure(model: config.Model, data_set: Path, steps: int, parallel: config.Parallel) -> config.Config:
    cfg = config.Config(model=model)
    cfg.data = config.Data(path=str(data_set), mixture={"code": 3, "chat": 1}, seq_len=64)
    cfg.train = config.Train(tokens=steps * 1024, global_batch_tokens=1024, micro_batch_size=4)
    cfg.optim = config.Optim(lr=1e-3, warmup_steps=2)
    cfg.moe = config.Moe(capacity_factor=1.25)
    cfg.parallel = parallel
    return cfg


@pytest.fixture(scope="module")
def report(compare) -> dict:
    return compare(2, 20, config.Parallel(expert_parallel=2, zero_stage=1), "dropless", "drop_and_pad")


@pytest.mark.parametrize("dispatch", ["dropless", "drop_and_pad"])
def test_twenty_steps_lose_alike(report, dispatch):
    losses = report[dispatch]["losses"]
    assert len(losses) == 20
    assert losses[-1][0] < losses[0][0] - 0.3  # it learns, so the comparison means something
    assert max(abs(one - two) for one, two in losses) <= 1e-5
    assert (report[dispatch]["dropped"] > 0) == (dispatch == "drop_and_pad")


@pytest.mark.parametrize("dispatch", ["dropless", "drop_and_pad"])
def test_every_named_gradient_is_equal(report, dispatch, small_model):
    gradients = report[dispatch]["gradients"]
    assert len(gradients) == 2 + small_model.num_hidden_layers * 12
    assert max(gradients.values()) < 2e-6, max(gradients, key=gradients.get)
    assert report[dispatch]["weights"] < 1e-4  # Adam's first steps are +-lr whatever the size of a gradient


@pytest.mark.parametrize("dispatch", ["dropless", "drop_and_pad"])
def test_a_two_rank_checkpoint_loads_on_one_process(report, dispatch):
    assert report[dispatch]["resharded"] < 1e-4


@pytest.mark.parametrize("dispatch", ["dropless", "drop_and_pad"])
def test_resumed_on_two_ranks_is_bitwise_the_same(report, dispatch):
    assert report[dispatch]["resumed"]


def test_four_ranks_of_expert_parallel_two_with_zero_2(compare):
    report = compare(4, 3, config.Parallel(expert_parallel=2, zero_stage=2), "dropless")["dropless"]
    assert max(abs(one - two) for one, two in report["losses"]) <= 1e-5
    assert max(report["gradients"].values()) < 2e-6
    assert report["resharded"] < 1e-4
    assert report["resumed"]


def test_a_world_that_does_not_fit_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "6")
    with pytest.raises(UserError, match=r"expert_parallel \(4\) must divide the number of processes \(6\)"):
        init_groups(config.Parallel(expert_parallel=4))
    with pytest.raises(UserError, match=r"plain runs on one process; there are 6"):
        init_groups(config.Parallel(engine="plain"))


def test_one_process_needs_no_process_group():
    groups = init_groups(dataclasses.replace(config.Parallel(), engine="auto"))
    assert (groups.rank, groups.world, groups.ep) == (0, 1, None)
    assert groups.local_experts(8) == range(8)
