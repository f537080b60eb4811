"""Training on a real SLURM: what ends a job, and that it goes on as if nothing had happened.

A start of two processes takes half a minute of imports on a slow machine, so one job goes through several faults.
"""

import os
import re
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from launch.restart import BAD_NODES, FAILED
from mm_train import config
from mm_train.fault_report import compare_checkpoints, compare_logs
from mm_train.metrics import read_metrics
from tests.launch.jobs import PATIENCE, ROOT, Job


def assert_as_if_nothing_had_happened(job: Job, reference: Path) -> None:
    """Every logged number and every bit of the last checkpoint are those of the undisturbed run."""
    assert compare_logs(reference, job.run) == []
    assert compare_checkpoints(reference, job.run) == []


def undisturbed(cfg: config.Config, processes: int, folder: Path) -> Path:
    """The same training on this machine, from beginning to end; its run folder."""
    own = replace(cfg, run=replace(cfg.run, dir=str(folder)), faults=replace(cfg.faults, hang_seconds=0.0))
    file = folder.with_suffix(".yaml")
    config.save(own, file)
    done = subprocess.run([ROOT / "launch/local.sh", str(processes), file], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder


@pytest.fixture
def two_ranks(small_config) -> config.Config:
    """A run long enough to be interrupted again and again."""
    small_config.parallel.expert_parallel = 2
    small_config.train.tokens = 320 * 512
    small_config.checkpoint.every = 20
    small_config.faults.hang_seconds = 30.0
    return small_config


@pytest.mark.timeout(1800)
def test_a_job_goes_on_after_a_bad_node_a_killed_rank_a_time_limit_and_a_hang(cluster, two_ranks, tmp_path):
    began = time.monotonic()
    for node in cluster.nodes[1:]:
        (tmp_path / "scratch" / node).mkdir(parents=True)
    scratch = {"MM_SCRATCH": f"{tmp_path}/scratch/$SLURMD_NODENAME", "MM_PREFLIGHT": "1"}
    job = Job(cluster, two_ranks, "--nodes=2", **scratch)

    job.wait_for_steps(1, 30)  # before, the preflight has found node1 unfit
    os.kill(job.rank(1), signal.SIGKILL)

    job.wait_for_steps(2, 10)
    cluster.run("scancel", "--batch", "--signal=USR1", job.id)  # what SLURM sends before the time limit

    job.wait_for_steps(3, 10)
    os.kill(job.rank(0), signal.SIGSTOP)
    reference = undisturbed(two_ranks, 2, tmp_path / "reference")  # nobody computes until the watchdog trips

    assert job.wait() == "COMPLETED", job.told()
    print(job.summary, f"{time.monotonic() - began:.0f} s")
    starts = job.starts
    assert [start.ended for start in starts] == [BAD_NODES, FAILED, "time", FAILED, "done"], job.summary
    assert [start.status for start in starts] == [1, 137, 75, 70, 0]
    assert starts[0].bad_nodes == ["node1"]
    assert f"preflight: node1 is unfit: scratch: {tmp_path}/scratch/node1 (MM_SCRATCH) cannot be written" in job.summary
    assert all(start.nodes == ["node2", "node3"] for start in starts[1:])
    assert "rank 1 on node3 was killed by signal 9; its last lines:" in job.summary
    assert starts[3].step == starts[2].step_after > starts[2].step + 9, "the warning cost no step"
    assert "hung (status 70); its last lines:" in job.summary
    assert re.search(r"no progress for .* rank 0 is silent since .*\(rank 0 on node2, rank 1 on node3\)", job.summary)
    code = job.run / f"slurm/code-{job.id}"
    assert (code / "mm_train/train.py").read_bytes() == (ROOT / "mm_train/train.py").read_bytes()
    logs = [(job.run / f"slurm/ranks/rank-{rank:05d}.log").read_text().count("=== job") for rank in (0, 1)]
    assert logs == [4, 4]

    assert_as_if_nothing_had_happened(job, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_training_goes_on_after_a_time_limit_a_preemption_a_lost_node_and_scancel(cluster, small_config, tmp_path):
    """One process. The time limit is SLURM's own, which looks every half minute; the lost node lives on: its process
    trains until the next start asks it to leave."""
    small_config.train.global_batch_tokens = 2048  # slow steps: it must not come to its end unobserved
    small_config.train.tokens = 600 * 2048
    small_config.checkpoint.every = 20
    job = Job(cluster, small_config, "--time=60", "--signal=B:USR1@120", MM_SIGNAL_SECONDS="30")
    job.wait_for_steps(0, 10)
    hours, minutes, _ = cluster.job(job.id)["RunTime"].split(":")
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={60 * int(hours) + int(minutes) + 2}")
    cluster.until(lambda: job.state == "PENDING", PATIENCE, "the requeue")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")
    assert "SLURM announced the end of the job's time" in job.summary
    job.wait_for_steps(1, 10)
    urgent = ["--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1"]
    cluster.submit(*urgent)
    job.wait_for_steps(2, 10)
    lost = cluster.job(job.id)["BatchHost"]
    cluster.kill_node(lost)
    try:
        job.wait_for_steps(3, 10)
    finally:
        cluster.start_node(lost)
    cluster.run("scancel", job.id)
    assert job.wait() == "CANCELLED", job.told()
    time.sleep(10)
    assert job.state == "CANCELLED"
    assert [start.ended for start in job.starts] == ["time", "time", FAILED, "cancelled"], job.summary
    assert job.starts[2].step == job.starts[1].step_after >= job.starts[1].step + 10, "preempted without a loss"
    assert "another process still trains in the run folder" in job.summary
    again = Job(cluster, small_config)
    assert again.wait() == "COMPLETED", again.told()
    print(job.summary)
    reference = undisturbed(small_config, 1, tmp_path / "reference")
    assert_as_if_nothing_had_happened(job, reference)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_torchrun_and_another_number_of_nodes(cluster, two_ranks, tmp_path):
    """Two nodes with torchrun, a kill, a stop by hand; the rest on one node with the other launcher and layout."""
    job = Job(cluster, two_ranks, "--nodes=2", MM_LAUNCHER="torchrun")
    job.wait_for_steps(0, 25)
    os.kill(job.rank(1), signal.SIGKILL)
    job.wait_for_steps(1, 10)
    (job.run / "STOP").touch()
    assert job.wait() == "FAILED", job.told()
    assert [(start.ended, start.status) for start in job.starts] == [(FAILED, 137), ("stopped", 75)], job.summary
    two_ranks.parallel.expert_parallel = 1
    again = Job(cluster, two_ranks)
    assert again.wait() == "COMPLETED", again.told()
    assert again.starts[-1].step == job.starts[1].step_after
    print(again.summary)
    records = read_metrics(again.run)
    assert [run["world"] for run in records["run"]] == [2, 2, 1]
    assert [record["step"] for record in records["train"]] == list(range(1, 321))
    reference = undisturbed(two_ranks, 1, tmp_path / "reference")
    losses = [[record["loss"] for record in read_metrics(run)["train"]] for run in (again.run, reference)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)  # other sums: not bit for bit
