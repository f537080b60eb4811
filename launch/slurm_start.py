"""One start of a training job under SLURM, from the first look at the run folder to the decision what comes after.

In this order: may the job start at all (RUN/DONE, restarts so far, who else trains there); preflight; training, which
is asked to stop when the job's time runs out; and then the end, or scontrol requeue. launch/restart.py decides.
RUN/slurm has it all: summary.log for people, restarts.jsonl, JOBID.log, ranks/.
"""

import contextlib
import os
import re
import signal
import subprocess
import time
from pathlib import Path

from launch import preflight_report, restart, slurm_site
from launch.local import Wakeup
from launch.slurm_job import Job
from launch.slurm_rank import log_file, read_ends
from mm_train.cli import LostContact, UserError
from mm_train.files import locked
from mm_train.stopping import STOPPED
from mm_train.watchdog import HUNG

LAST_LINES = 15  # of a rank that failed, in the summary
LAST_BYTES = 2**20  # of its log that are looked at
LOST_SECONDS = 300.0  # for a process on a node that SLURM has lost to write its checkpoint and leave
LAST_SECONDS = 15.0  # before the end of the job's time, for the requeue: after it SLURM would not hear of one
KILL_SECONDS = 10.0  # between two attempts to end a step
REQUEUED_SECONDS = 60.0  # within which SLURM ends a job that it has requeued
# A step's process on each node: a signal for the ranks would end torchrun's agent.
TORCHRUN = 'trap "" USR1; exec "$0" -m torch.distributed.run --node-rank "$SLURM_NODEID" "$@"'


class JobStart:
    """This start of the job."""

    def __init__(self, job: Job, site: slurm_site.Site, run_dir: Path) -> None:
        self.job, self.site, self.run_dir = job, site, run_dir
        self.folder = run_dir / "slurm"
        self.world = len(job.nodes) * site.tasks
        self.history = restart.History(run_dir, job.id)
        self.warned: str | None = None
        self.cancelled = False
        self.bad_nodes: dict[str, str] = {}  # and why
        self.addresses: dict[str, str] = {}
        ends_at = job.ends_at()
        self.warn_at = ends_at - site.warn_seconds if ends_at else None
        self.last_moment: float | None = None  # in which a job that was warned can still be requeued

    def run(self) -> int:
        """Exit status of the batch script."""
        signal.signal(signal.SIGUSR1, lambda *_: None)  # it was ignored until now, and Wakeup would leave it so
        with Wakeup([signal.SIGUSR1, signal.SIGTERM, signal.SIGCHLD]) as wakeup:
            if (self.run_dir / "DONE").exists():
                self.say("nothing to do: the run is done")
                return 0
            if self.warn_at and self.warn_at <= time.time():
                seconds = f"{self.site.warn_seconds:.0f}"
                self.say(
                    f"not started: fewer than {seconds} s are left, at which the run is stopped (MM_SIGNAL_SECONDS)"
                )
                return UserError.status
            self.take_back_stop()
            if not self.is_free() and not self.job.restarts:
                self.say(f"not started: another job or process trains in {self.run_dir}; {self.stop_file} would end it")
                return UserError.status
            self.wait_for_lost(wakeup)
            step, limits = restart.newest_step(self.run_dir), self.site.limits
            if why_not := restart.refusal(self.history.starts, step, limits):
                self.say(f"not started: {why_not}")
                return 1
            nodes = list(self.job.nodes)
            try:
                self.addresses = self.job.addresses(nodes)
            except UserError as error:
                self.say(f"not started: {error}")
                return error.status
            self.history.begin(self.job.restarts, step, nodes, self.world)
            self.say(f"{self.world} processes on {', '.join(nodes)} go on after step {step}")
            status = self.preflight(wakeup) if self.site.preflight else None
            if self.bad_nodes:
                return self.without_bad_nodes(wakeup)
            if status is None and not (self.warned or self.cancelled):
                status = self.train(wakeup)
            done = (self.run_dir / "DONE").exists()
            ending = restart.Ending(status, done, self.warned, self.cancelled)
            step = restart.newest_step(self.run_dir)
            decision = restart.decide(ending, self.history.starts, step, limits)
            self.history.end(self.job.restarts, decision.ended, status, step)
            self.say(decision.why)
            return self.requeue(wakeup, decision.status) if decision.requeue else decision.status

    def wait_for_lost(self, wakeup: Wakeup) -> None:
        """Ask a process of an earlier start to stop, and wait: a node that SLURM has lost may be alive."""
        if self.is_free():
            return
        self.say("another process still trains in the run folder (on a node that SLURM has lost?): it is asked to stop")
        self.stop_file.write_text(f"{self.mark}\n")
        end = time.monotonic() + LOST_SECONDS
        while time.monotonic() < end and not (self.is_free() or self.warned or self.cancelled):
            self.listen(wakeup, 1.0)
        self.take_back_stop()

    def is_free(self) -> bool:
        """Does nobody train in the run folder? (On a file system without locks nobody seems to.)"""
        try:
            with locked(self.run_dir):
                return True
        except UserError:
            return False

    # --- preflight ------------------------------------------------------------------------------------------------

    def preflight(self, wakeup: Wakeup) -> int | None:
        """Try every node. None when training may begin; else its status, or what is wrong is in `bad_nodes`."""
        nodes, site = self.job.nodes, self.site
        folder, notes = self.folder / "preflight" / self.job.start, list[str]()
        limits = {"seconds": site.preflight_seconds, "disk_gib": site.disk_gib, "gpus": site.gpus}
        more = {"port": self.job.port + 1, "scratch": site.scratch}
        preflight_report.write_plan(folder, self.addresses, self.run_dir, **limits, **more)
        for part in preflight_report.PARTS:
            check = [*site.srun(len(nodes), 1, "--wait=0"), site.python, "-m", "launch.preflight", str(folder), part]
            self.attend(subprocess.Popen(check), wakeup, time.monotonic() + site.preflight_seconds)
            if self.warned or self.cancelled:
                return None
            verdict = preflight_report.judge(folder / part, nodes)
            self.bad_nodes = verdict.bad
            for node, why in verdict.bad.items():
                self.say(f"preflight: {node} is unfit: {why}")
            if verdict.problem:
                self.say(f"preflight: {verdict.problem}")
                return LostContact.status
            if verdict.bad:
                return None
            notes.extend(verdict.notes)
        self.say("; ".join([f"preflight: {len(nodes)} nodes are fit", *notes]))
        return None

    def without_bad_nodes(self, wakeup: Wakeup) -> int:
        """Requeue, to start on other nodes; where there are too few, the end."""
        step, bad, wanted = restart.newest_step(self.run_dir), list(self.bad_nodes), len(self.job.nodes)
        self.history.end(self.job.restarts, restart.BAD_NODES, 1, step, bad)
        left = wanted - len(bad) + len(self.job.others())
        without = f"without {', '.join(bad)}"
        if len(bad) == wanted > 1:
            self.say("every node is unfit, which is a setting of the site more likely than the nodes: the end")
            return 1
        if asked := sorted(set(bad) & self.job.asked_for()):
            self.say(
                f"the job was submitted for {', '.join(asked)} (--nodelist), so it cannot go on elsewhere: the end"
            )
            return 1
        if left < wanted:
            self.say(
                f"partition {self.job.partition} has {left} usable nodes {without}, and {wanted} are wanted: the end"
            )
            return 1
        self.say(f"requeued {without}")
        return self.requeue(wakeup, 1)

    # --- training -------------------------------------------------------------------------------------------------

    def train(self, wakeup: Wakeup) -> int:
        """Status of training: of the rank that failed first, STOPPED, or 0."""
        address, port = self.addresses[self.job.nodes[0]], self.job.port
        meet = {"MASTER_ADDR": address, "MASTER_PORT": str(port)}
        environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | meet
        python = self.site.python
        rank = [python, "-m", "launch.slurm_rank", str(self.folder), self.job.start]
        rank += [python, "-m", "mm_train.train", str(self.folder / self.job.config)]
        nodes = len(self.job.nodes)
        flags = ("--kill-on-bad-exit=1", "--wait=0")
        if self.site.launcher == "torchrun":
            torchrun = ["bash", "-c", TORCHRUN, python, f"--nnodes={nodes}"]
            torchrun += [f"--nproc-per-node={self.site.tasks}", f"--master-addr={address}", f"--master-port={port}"]
            step = [*self.site.srun(nodes, 1, *flags), *torchrun, "--no-python", *rank]
        else:
            step = [*self.site.srun(nodes, self.site.tasks, *flags), *rank]
        code = self.attend(subprocess.Popen(step, env=environment), wakeup)
        return self.judge(code)

    def attend(self, step: subprocess.Popen, wakeup: Wakeup, deadline: float | None = None) -> int:
        """Until the step ends: watch the clock, and pass on what comes. A step with a `deadline` (time.monotonic) is
        ended by it, and by a warning."""
        while step.poll() is None:
            waits = [self.warn_at - time.time()] if self.warn_at and not self.warned else []
            waits += [self.last_moment - time.time()] if self.last_moment else []
            waits += [deadline - time.monotonic()] if deadline else []
            self.listen(wakeup, max(0.0, min(waits)) if waits else None, step)
            if self.last_moment and time.time() >= self.last_moment and not self.cancelled:
                self.say("training has not stopped, and SLURM is about to end the job for good: it is ended now")
                step.kill()
                step.wait()
            if deadline and (self.warned or time.monotonic() >= deadline):
                step.terminate()  # srun ends its processes
                deadline = time.monotonic() + KILL_SECONDS
        return step.returncode

    def listen(self, wakeup: Wakeup, seconds: float | None, step: subprocess.Popen | None = None) -> None:
        """Take what comes within so many seconds."""
        for number in wakeup.wait(seconds):
            if number == signal.SIGUSR1:
                self.warn("SLURM announced the end of the job's time", step)
            elif number == signal.SIGTERM:
                self.cancelled = True  # written down at once: SLURM may not leave time for more
                self.history.end(self.job.restarts, restart.CANCELLED, None, restart.newest_step(self.run_dir))
                if step:
                    step.send_signal(signal.SIGTERM)
        if self.warn_at and not self.warned and time.time() >= self.warn_at:
            ends_at = self.job.ends_at()  # somebody may have given it more time since
            self.warn_at = ends_at - self.site.warn_seconds if ends_at else None
            if self.warn_at and time.time() >= self.warn_at:
                self.warn(f"{self.site.warn_seconds:.0f} s are left of the job's time", step)

    def warn(self, why: str, step: subprocess.Popen | None) -> None:
        """Have training stop with a checkpoint: by a file, which no start-up misses, and a signal, which is quicker."""
        if self.warned:
            return
        self.warned = why
        self.say(f"{why}: training is asked to stop")
        ends_at = self.job.ends_at()
        self.last_moment = ends_at - min(LAST_SECONDS, self.site.warn_seconds / 2) if ends_at else None
        with contextlib.suppress(OSError):  # a full disk, say: the signal is left
            self.stop_file.write_text(f"{self.mark}\n")
        if step:
            step.send_signal(signal.SIGUSR1)

    @property
    def stop_file(self) -> Path:
        return self.run_dir / "STOP"

    @property
    def mark(self) -> str:
        return f"job {self.job.id}"

    def take_back_stop(self) -> None:
        """What an earlier start of this job asked for is over; a STOP of somebody else holds."""
        with contextlib.suppress(OSError):
            if self.stop_file.read_text().startswith(self.mark):
                self.stop_file.unlink()

    def judge(self, code: int) -> int:
        """The status of all ranks, from what they left and the status of srun; a failure goes into the summary."""
        ends = read_ends(self.folder, self.job.start)
        failed = [end for end in ends if end["status"] not in (0, STOPPED)]
        if not failed:
            if (code or not ends) and not self.cancelled:
                self.say(f"srun ended with status {code}, and no process said why; see {self.folder / self.job.log}")
                return code if code > 0 else 128 - code if code < 0 else LostContact.status
            return STOPPED if any(end["status"] == STOPPED for end in ends) else 0
        # A rank that lost the others is a consequence, and so is what comes later.
        first = min(failed, key=lambda end: (end["status"] == LostContact.status, end["time"]))
        self.say(f"rank {first['rank']} on {first['node']} {restart.describe(first['status'])}; its last lines:")
        with log_file(self.folder, first["rank"]).open("rb") as log:
            log.seek(max(first["log_offset"], os.fstat(log.fileno()).st_size - LAST_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        if first["status"] == HUNG:  # stacks follow what it says of the others
            lines = [self.with_nodes(line) for line in lines if "no progress for" in line]
        self.write("".join(f"    {line}\n" for line in lines[-LAST_LINES:]))
        return int(first["status"])

    def with_nodes(self, line: str) -> str:
        """The line, with the node of every rank that it names."""
        nodes, tasks = self.job.nodes, self.site.tasks
        ranks = re.findall(r"\brank (\d+)\b", line)
        named = {f"rank {rank} on {nodes[int(rank) // tasks]}" for rank in ranks if int(rank) < self.world}
        return f"{line} ({', '.join(sorted(named))})"

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
        bad = list(self.bad_nodes)
        while time.monotonic() < end and (bad or signal.SIGTERM not in wakeup.wait(1)):
            try:
                if bad:  # possible only now that the job waits again
                    self.job.exclude(bad)
                bad = []
            except UserError as error:  # the signal that ends this process also ends scontrol
                print(f"once more: {error}", flush=True)
        return status

    def say(self, text: str) -> None:
        """A line in the summary, and in the job's log."""
        line = f"{restart.now()} job {self.job.id} start {self.job.restarts}: {text}"
        self.write(line + "\n")
        print(line, flush=True)

    def write(self, text: str) -> None:
        with (self.folder / "summary.log").open("a", encoding="utf-8") as file:
            file.write(text)
