"""What becomes of a job on a real SLURM, by what its processes do: a program of a few lines stands for training.

With training itself: test_slurm.py. Here it is who starts, warns, requeues and gives up.
"""

import re
import shutil
import sys
from pathlib import Path

import pytest

from launch import snapshot
from launch.restart import FAILED
from mm_train import config
from tests.launch.jobs import ROOT, Job

TRAINING = """
import fcntl, os, signal, sys, time
from pathlib import Path
run = Path(sys.argv[1]).parents[1]
mode = os.environ["MODE"]
print("this is", mode, "on", os.environ["SLURMD_NODENAME"], os.environ["RANK"], os.environ["WORLD_SIZE"], flush=True)
lock = open(run / "lock", "a")
if os.environ["RANK"] == "0":
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        sys.exit(2)  # as training does
def leave(*_):
    step = len(list((run / "checkpoints").glob("step-*"))) + 1
    (run / f"checkpoints/step-{step:08d}").mkdir(parents=True)
    (run / "STOP").unlink(missing_ok=True)
    os._exit(75)
for number in (signal.SIGTERM, signal.SIGUSR1) if "deaf" not in mode else ():
    signal.signal(number, leave)
if mode == "crash":
    sys.exit(3)
if mode == "bad":
    sys.exit(2)
if mode.startswith("until requeued") and os.environ.get("SLURM_RESTART_COUNT"):
    (run / "DONE").touch()
    sys.exit(0)
while not (run / "STOP").exists() or "deaf" in mode:
    (run / "up").touch()
    time.sleep(0.05)
leave()
"""


@pytest.fixture
def start(cluster, small_config, tmp_path):
    """Submit a job whose training is the program above, in a mode of it."""
    script, python = tmp_path / "training.py", tmp_path / "python"
    script.write_text(TRAINING)
    train = f'[ "$1 $2" != "-m mm_train.train" ] || exec {sys.executable} {script} "${{@:3}}"'
    hang = '[ "$1 $2 $HANGS$SLURM_RESTART_COUNT" != "-m launch.preflight yes" ] || exec sleep 600'
    python.write_text(f'#!/bin/bash\n{hang}\n{train}\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)

    def submit(mode: str, *flags: str, **variables: str) -> Job:
        small_config.run.dir = str(tmp_path / mode.replace(" ", "-") / "run")
        Path(small_config.run.dir).parent.mkdir()
        return Job(cluster, small_config, *flags, MM_PYTHON=str(python), MODE=mode, **variables)

    return submit


def test_crashes_bad_input_a_stop_by_hand_scancel_and_a_node_that_hangs(start, cluster):
    crash = start("crash", "--nodes=2", "--ntasks-per-node=2", MM_MAX_NO_PROGRESS="2")
    bad = start("bad")
    hangs = start("until requeued", MM_PREFLIGHT="1", MM_PREFLIGHT_SECONDS="10", HANGS="yes")
    stopped, cancelled = start("stopped"), start("cancelled")
    for job in (stopped, cancelled):
        cluster.until((job.run / "up").exists, 60, "the start")
    (stopped.run / "STOP").touch()
    cluster.run("scancel", cancelled.id)

    assert bad.wait() == "FAILED"
    assert (bad.starts[0].ended, cluster.job(bad.id)["ExitCode"]) == ("bad input", "2:0")
    assert "rank 0 on node" in bad.summary
    assert "    this is bad on node" in bad.summary
    assert "the same command would fail again: not requeued" in bad.summary

    assert stopped.wait() == "FAILED"
    assert (stopped.starts[0].ended, cluster.job(stopped.id)["ExitCode"]) == ("stopped", "75:0")
    assert stopped.starts[0].step_after == 1

    assert crash.wait() == "FAILED"
    assert [(s.restart, s.ended, s.status) for s in crash.starts] == [(0, FAILED, 3), (1, FAILED, 3)], crash.told()
    assert "given up: the last 2 starts began at step 0 and left no newer checkpoint" in crash.summary
    log = (crash.run / "slurm/ranks/rank-00003.log").read_text()
    assert log.count("=== job") == 2
    assert re.search(r"this is crash on node\d 3 4\n", log), "rank 3 of 4"

    assert hangs.wait() == "COMPLETED", hangs.told()
    bad = hangs.starts[0].bad_nodes
    assert bad == hangs.starts[0].nodes != hangs.starts[1].nodes
    assert f"preflight: {bad[0]} is unfit: no answer" in hangs.summary

    assert cancelled.wait() == "CANCELLED"  # long enough ago to have been requeued, had somebody asked for it
    assert [s.ended for s in cancelled.starts] == ["cancelled"], cancelled.told()
    assert cluster.job(cancelled.id)["Restarts"] == "0"


def test_a_run_folder_in_use_and_nodes_that_cannot_be_replaced(start, cluster, small_config, tmp_path):
    small_config.train.global_batch_tokens = 768  # for three processes
    first = start("first")
    cluster.until((first.run / "up").exists, 60, "the start")
    second = Job(
        cluster, config.load([first.run.parent / "run.yaml"]), MODE="second", MM_PYTHON=str(tmp_path / "python")
    )
    assert second.wait() == "FAILED"
    assert f"job {second.id} start 0: not started: another job or process trains in {first.run}" in first.summary
    assert first.state == "RUNNING"
    cluster.run("scancel", first.id)
    unfit = {"MM_PREFLIGHT": "1", "MM_SCRATCH": f"{tmp_path}/nowhere/$SLURMD_NODENAME"}
    named, everywhere = start("named", "--nodelist=node2", **unfit), start("everywhere", "--nodes=3", **unfit)
    assert [named.wait(), everywhere.wait()] == ["FAILED", "FAILED"]
    assert "the job was submitted for node2 (--nodelist), so it cannot go on elsewhere: the end" in named.summary
    assert f"preflight: node3 is unfit: scratch: {tmp_path}/nowhere/node3 (MM_SCRATCH) cannot be" in everywhere.summary
    assert "every node is unfit, which is a setting of the site more likely than the nodes" in everywhere.summary
    (tmp_path / "nowhere/node1").mkdir(parents=True)
    too_few = start("too few", "--nodes=3", **unfit)
    assert too_few.wait() == "FAILED"
    assert "has 1 usable nodes without node2, node3, and 3 are wanted: the end" in too_few.summary


def test_a_preempted_job_leaves_with_a_checkpoint_and_comes_back(start, cluster, tmp_path):
    project = snapshot.take(ROOT, tmp_path / "project")
    job = start("until requeued", MM_ROOT=str(project))
    cluster.until((job.run / "up").exists, 60, "the start")
    for package in ("launch", "mm_train"):  # what happens to the project's folder does not reach the job
        shutil.rmtree(project / package)
    shutil.copytree(ROOT / "launch", project / "launch", ignore=shutil.ignore_patterns("*.py"))
    urgent = cluster.submit("--partition=urgent", "--nodes=3", "--exclusive", "--output=/dev/null", "--wrap", "sleep 1")
    assert job.wait() == "COMPLETED", job.told()
    assert cluster.job(urgent)["JobState"] == "COMPLETED"
    assert [(s.ended, s.status, s.step_after) for s in job.starts] == [("time", 75, 1), ("done", 0, 1)], job.told()


@pytest.mark.slow
def test_a_job_that_has_been_lost_is_asked_to_leave_before_the_next_start(start, cluster):
    """The node of the batch script stops answering and lives on: SLURM requeues, and two would train in one folder."""
    job = start("until requeued")
    cluster.until((job.run / "up").exists, 60, "the start")
    lost = cluster.job(job.id)["BatchHost"]
    cluster.kill_node(lost)
    try:
        assert job.wait() == "COMPLETED", job.told()
    finally:
        cluster.start_node(lost)
        cluster.wait_idle()
    assert "another process still trains in the run folder" in job.summary
    assert [(s.restart, s.ended) for s in job.starts] == [(0, FAILED), (1, "done")], job.summary
    assert "start 0: not requeued: SLURM has the job as" in job.summary, "the lost batch script left it alone"
    assert (job.starts[0].nodes == [lost], job.starts[1].nodes == [lost]) == (True, False)
    assert job.starts[1].step == 1, "what it did until then was kept"


@pytest.mark.slow
def test_both_ways_of_learning_that_time_runs_out(start, cluster):
    """SLURM's signal, which may come half a minute late, and the job's own clock where SLURM sends another signal."""
    told = start("until requeued", "--time=2", "--signal=B:USR1@90", MM_SIGNAL_SECONDS="20")
    clock = start("until requeued by the clock", "--time=1", "--signal=B:URG@1", MM_SIGNAL_SECONDS="30")
    deaf = start("until requeued deaf", "--time=1", "--signal=B:USR1@50", MM_SIGNAL_SECONDS="50")
    short = start("short", "--time=1", MM_SIGNAL_SECONDS="60")
    assert short.wait() == "FAILED"
    assert "not started: fewer than 60 s are left" in short.summary
    for job, words in ((told, "SLURM announced the end"), (clock, "30 s are left of the job's time")):
        assert job.wait() == "COMPLETED", job.told()
        assert [(s.ended, s.status, s.step_after) for s in job.starts] == [("time", 75, 1), ("done", 0, 1)], job.told()
        assert words in job.summary
    assert deaf.wait() == "COMPLETED", deaf.told()
    assert "training has not stopped, and SLURM is about to end the job for good" in deaf.summary
    assert [(s.ended, s.step_after) for s in deaf.starts] == [("time", 0), ("done", 0)], deaf.told()
