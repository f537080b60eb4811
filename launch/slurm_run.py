"""One start of a training job under SLURM, from the settings to the decision what comes after. slurm_body.sh runs it.

    python -m launch.slurm_run STAGE FILE.yaml ... key=value ...

In this order: resolve the configuration; copy the code and go on from the copy; look whether the job may start at all
(RUN/DONE, restarts so far); preflight; training, which is asked to stop when the job's time runs out; and then the end,
or scontrol requeue. launch/restart.py decides. RUN/slurm has it all: summary.log for people, restarts.jsonl, JOBID.log,
ranks/.
"""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from launch import restart, slurm_site, snapshot
from launch.local import Wakeup
from launch.slurm_job import Job
from launch.slurm_rank import log_file, read_ends
from mm_train.cli import LostContact, UserError, command
from mm_train.stopping import STOPPED

COPY = "MM_JOB_COPY"  # JSON in the environment: what the process before the copy has found out
LAST_LINES = 15  # of a rank that failed, in the summary
REQUEUED_SECONDS = 60.0  # within which SLURM ends a job that it has requeued
TORCHRUN = 'trap "" USR1; exec "$0" --node-rank "$SLURM_NODEID" "$@"'  # its agent would die of a signal for the ranks


@command
def main(argv: Sequence[str] | None = None) -> int:
    stage, *words = sys.argv[1:] if argv is None else argv
    job = Job.read(os.environ)
    root = Path(os.environ.get("MM_ROOT") or Path.cwd())
    if COPY not in os.environ:
        go_on_from_copy(job, root, stage, words)
    facts = json.loads(os.environ.pop(COPY))
    run_dir = Path(facts["run_dir"])
    return JobStart(job, slurm_site.read(os.environ, root, run_dir), run_dir).run()


def go_on_from_copy(job: Job, root: Path, stage: str, words: list[str]) -> None:
    """Resolve the configuration, copy the code, and become the same program in the copy. Raises UserError."""
    site = slurm_site.read(os.environ, root)
    if not any(word.endswith((".yaml", ".yml")) and "=" not in word for word in words):
        words = ["configs/model/s.yaml", f"configs/stage/{stage}.yaml", *words]
    world = len(job.nodes) * site.tasks
    ask = [site.python, "-m", "launch.resolved", str(world), config_file(job), *words]
    if site.container:
        ask = [*site.srun(1, 1), *ask]
    done = subprocess.run(ask, stdout=subprocess.PIPE, text=True)  # what is wrong, it says on stderr
    if done.returncode:
        sys.exit(done.returncode)
    facts = done.stdout.strip().splitlines()[-1]
    slurm = Path(json.loads(facts)["run_dir"]) / "slurm"
    code = snapshot.take(root, slurm / f"code-{job.id}")
    print(f"job {job.id}: what follows is in {slurm / job.id}.log", flush=True)
    log = os.open(slurm / f"{job.id}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    new = {COPY: facts, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "launch.slurm_run", stage], os.environ | new)


def config_file(job: Job) -> str:
    """In RUN/slurm: with what the job trains in all its starts."""
    return f"config-{job.id}.yaml"


class JobStart:
    """This start of the job."""

    def __init__(self, job: Job, site: slurm_site.Site, run_dir: Path) -> None:
        self.job, self.site, self.run_dir = job, site, run_dir
        self.folder = run_dir / "slurm"
        self.world = len(job.nodes) * site.tasks
        self.history = restart.History(run_dir, job.id)
        self.warned: str | None = None
        self.cancelled = False
        ends_at = job.ends_at()
        self.warn_at = ends_at - site.warn_seconds if ends_at else None

    def run(self) -> int:
        """Exit status of the batch script."""
        signal.signal(signal.SIGUSR1, signal.SIG_DFL)  # it was ignored until now, and Wakeup leaves it so
        with Wakeup([signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD]) as wakeup:
            if (self.run_dir / "DONE").exists():
                self.say("nothing to do: the run is done")
                return 0
            step, limits = restart.newest_step(self.run_dir), self.site.limits
            if why_not := restart.refusal(self.history.starts, step, limits):
                self.say(f"not started: {why_not}")
                return 1
            nodes = list(self.job.nodes)
            self.history.begin(self.job.restarts, step, nodes, self.world)
            self.say(f"{self.world} processes on {', '.join(nodes)} go on after step {step}")
            self.take_back_stop()
            status = self.train(wakeup)
            done = (self.run_dir / "DONE").exists()
            ending = restart.Ending(status, done, self.warned, self.cancelled)
            step = restart.newest_step(self.run_dir)
            decision = restart.decide(ending, self.history.starts, step, limits)
            self.history.end(decision.ended, status, step)
            self.say(decision.why)
            return self.requeue(wakeup, decision.status) if decision.requeue else decision.status

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, wakeup: Wakeup) -> int:
        """Status of training: of the rank that failed first, STOPPED, or 0."""
        address, port = self.job.address(), self.job.port
        meet = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | meet
        python = self.site.python
        rank = [python, "-m", "launch.slurm_rank", str(self.folder), self.job.start]
        rank += [python, "-m", "mm_train.train", str(self.folder / config_file(self.job))]
        nodes = len(self.job.nodes)
        flags = ("--kill-on-bad-exit=1", "--wait=0")
        if self.site.launcher == "torchrun":
            torchrun = ["bash", "-c", TORCHRUN, python, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
            torchrun += [f"--nproc-per-node={self.site.tasks}", f"--master-addr={address}", f"--master-port={port}"]
            step = [*self.site.srun(nodes, 1, *flags), *torchrun, "--no-python", *rank]
        else:
            step = [*self.site.srun(nodes, self.site.tasks, *flags), *rank]
        code = self.attend(subprocess.Popen(step, env=environment), wakeup)
        return self.judge(code)

    def attend(self, step: subprocess.Popen, wakeup: Wakeup) -> int:
        """Until the step ends: watch the clock, and pass on what comes."""
        while step.poll() is None:
            seconds = max(0.0, self.warn_at - time.time()) if self.warn_at and not self.warned else None
            for number in wakeup.wait(seconds):
                if number == signal.SIGUSR1:
                    self.warn("SLURM announced the end of the job's time", step)
                elif number == signal.SIGTERM:
                    self.cancelled = True
                    step.send_signal(signal.SIGTERM)
            if self.warn_at and not self.warned and time.time() >= self.warn_at:
                ends_at = self.job.ends_at()  # somebody may have given it more time since
                self.warn_at = ends_at - self.site.warn_seconds if ends_at else None
                if self.warn_at and time.time() >= self.warn_at:
                    self.warn(f"{self.site.warn_seconds:.0f} s are left of the job's time", step)
        return step.returncode

    def warn(self, why: str, step: subprocess.Popen) -> None:
        """Have training stop with a checkpoint: by a file, which no start-up misses, and a signal, which is quicker."""
        if self.warned:
            return
        self.warned = why
        self.say(f"{why}: training is asked to stop")
        self.stop_file.write_text(f"{self.mark}\n")
        step.send_signal(signal.SIGUSR1)

    @property
    def stop_file(self) -> Path:
        return self.run_dir / "STOP"

    @property
    def mark(self) -> str:
        return f"job {self.job.id}"

    def take_back_stop(self) -> None:
        """What an earlier start of this job asked for is over; a STOP of somebody else holds."""
        try:
            if self.stop_file.read_text().startswith(self.mark):
                self.stop_file.unlink()
        except OSError:
            pass

    def judge(self, code: int) -> int:
        """The status of all ranks, from what they left and the status of srun; a failure goes into the summary."""
        ends = read_ends(self.folder, self.job.start)
        failed = [end for end in ends if end["status"] not in (0, STOPPED)]
        if not failed:
            if code:
                self.say(f"srun ended with status {code}, and no process said why; see {self.folder / self.job.id}.log")
                return code if code > 0 else 128 - code
            return STOPPED if any(end["status"] == STOPPED for end in ends) else 0
        # A rank that lost the others is a consequence, and so is what comes later.
        first = min(failed, key=lambda end: (end["status"] == LostContact.status, end["time"]))
        self.say(f"rank {first['rank']} on {first['node']} {restart.describe(first['status'])}; its last lines:")
        with log_file(self.folder, first["rank"]).open("rb") as log:
            log.seek(first["log_offset"])
            lines = log.read().decode(errors="replace").splitlines()
        self.write("".join(f"    {line}\n" for line in lines[-LAST_LINES:]))
        return int(first["status"])

    # --- the end --------------------------------------------------------------------------------------------------

    def requeue(self, wakeup: Wakeup, status: int) -> int:
        """Have SLURM start the job again, which ends this process."""
        try:
            why_not = self.job.requeue()
        except UserError as error:
            why_not = str(error)
        if why_not:
            self.say(f"not requeued: {why_not}")
            return status
        end = time.monotonic() + REQUEUED_SECONDS
        while time.monotonic() < end and signal.SIGTERM not in wakeup.wait(1):
            pass
        return status

    def say(self, text: str) -> None:
        """A line in the summary, and in the job's log."""
        line = f"{restart.now()} job {self.job.id} start {self.job.restarts}: {text}"
        self.write(line + "\n")
        print(line, flush=True)

    def write(self, text: str) -> None:
        with (self.folder / "summary.log").open("a", encoding="utf-8") as file:
            file.write(text)


if __name__ == "__main__":
    sys.exit(main())
