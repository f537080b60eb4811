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
from tests.launch.jobs import PATIENCE, ROOT, Job


def assert_as_if_nothing_had_happened(job: Job, reference: Path) -> None:
    """Every logged number and every bit of the last checkpoint are those of the undisturbed run."""
    assert compare_logs(reference, job.run) == []
    assert compare_checkpoints(reference, job.run) == []


@pytest.fixture
def two_ranks(small_config) -> config.Config:
    """A run long enough to be interrupted again and again."""
    small_config.parallel.expert_parallel = 2
    small_config.train.tokens = 320 * 512
    small_config.checkpoint.every = 20
    small_config.faults.hang_seconds = 20.0
    return small_config


@pytest.mark.timeout(1800)
def test_a_job_goes_on_after_a_bad_node_a_killed_rank_a_time_limit_and_a_hang(cluster, two_ranks, tmp_path):
    began = time.monotonic()
    for node in cluster.nodes[1:]:
        (tmp_path / "scratch" / node).mkdir(parents=True)
    scratch = {"MM_SCRATCH": f"{tmp_path}/scratch/$SLURMD_NODENAME", "MM_PREFLIGHT": "1", "MM_SIGNAL_SECONDS": "60"}
    job = Job(cluster, two_ranks, "--nodes=2", "--time=60", "--signal=B:USR1@120", **scratch)

    job.wait_for_steps(1, 30)  # before, the preflight has found node1 unfit
    os.kill(job.rank(1), signal.SIGKILL)

    job.wait_for_steps(2, 10)
    minutes = 2 + int(sum(int(part) * 60**power for power, part in enumerate(reversed(elapsed(job).split(":"))))) // 60
    cluster.run("scontrol", "update", f"JobId={job.id}", f"TimeLimit={minutes}")  # SLURM sends its signal now
    cluster.until(lambda: job.state == "PENDING", PATIENCE, "the requeue")
    cluster.run("scontrol", "update", f"JobId={job.id}", "TimeLimit=60")

    job.wait_for_steps(3, 10)
    os.kill(job.rank(0), signal.SIGSTOP)

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

    reference = replace(two_ranks, run=replace(two_ranks.run, dir=str(tmp_path / "reference")))
    config.save(reference, tmp_path / "reference.yaml")
    subprocess.run([ROOT / "launch/local.sh", "2", tmp_path / "reference.yaml"], check=True, capture_output=True)
    assert_as_if_nothing_had_happened(job, tmp_path / "reference")


def elapsed(job: Job) -> str:
    """How long this start of a job has run, H:M:S."""
    return job.cluster.job(job.id)["RunTime"]
