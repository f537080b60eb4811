"""SLURM's commands as functions: submit, cancel, ask for a job, a partition, an account. Torch-free."""

import getpass
import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm_train.cli import UserError

SECONDS = 60.0  # a controller that is busy answers late
# States of a job that is over; in every other one it is queued, running or about to be.
OVER = {
    *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"),
    *("OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL", "PREEMPTED", "REVOKED"),
}


UNREACHABLE = ("configuration source", "Unable to contact", "Connection refused", "Connection timed out")


class Unreachable(UserError):
    """This machine's SLURM commands find no cluster, or its controller does not answer."""


@dataclass(frozen=True)
class JobState:
    """A job as SLURM has it; of an array, one task."""

    job: str
    task: str | None  # index in an array; of tasks that wait, all of them, as "3,5-7%2"
    state: str  # RUNNING, PENDING, ...
    reason: str  # why it waits, or "None"
    restarts: int
    nodes: str
    exit_code: str  # "status:signal"

    @property
    def count(self) -> int:
        """Tasks that this stands for."""
        parts = re.findall(r"(\d+)(?:-(\d+))?", (self.task or "0").split("%")[0])
        return sum(int(last or first) - int(first) + 1 for first, last in parts)

    @property
    def is_over(self) -> bool:
        return self.state in OVER


def is_here() -> bool:
    """Are SLURM's commands installed on this machine?"""
    return shutil.which("sbatch") is not None


def call(*words: str, environment: Mapping[str, str] | None = None) -> str:
    """What a command prints. Raises UserError with the last line of its complaint."""
    try:
        done = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, env=environment)
    except FileNotFoundError:
        raise UserError(f"{words[0]} is not installed here") from None
    except subprocess.TimeoutExpired:
        raise Unreachable(f"{words[0]} did not answer within {SECONDS:.0f} s") from None
    if done.returncode:
        said = complaint(done.stderr) or f"{words[0]} ended with status {done.returncode}"
        if any(text in said for text in UNREACHABLE):
            raise Unreachable(f"SLURM does not answer ({words[0]}: {said})")
        raise UserError(said)
    return done.stdout


def complaint(text: str) -> str:
    """SLURM's own words, without the names of its commands and functions."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return re.sub(r"^\w+: (error: )?(\w+ error: |Batch job submission failed: )?", "", lines[-1]) if lines else ""


def submit(command: Sequence[str], environment: Mapping[str, str]) -> str:
    """Run an sbatch command with --parsable; returns the job id. Raises UserError with SLURM's reason."""
    answer = call(*command, environment=environment).strip().splitlines()
    job = answer[-1].split(";")[0] if answer else ""  # a federation adds its cluster's name
    if not job.isdecimal():
        raise UserError(f"sbatch did not answer with a job id, but with {' '.join(answer)!r:.200}")
    return job


def cancel(jobs: Sequence[str]) -> None:
    """End jobs, in whatever state. Raises UserError."""
    if jobs:
        call("scancel", *jobs)


def job_states(job: str) -> list[JobState]:
    """A job, or the tasks of an array that have begun and the rest in one; [] when SLURM has forgotten it."""
    try:
        text = call("scontrol", "show", "job", job, "-o")
    except UserError as error:
        if "Invalid job id" not in str(error):
            raise
        return _from_accounting(job)
    found = []
    for line in text.splitlines():
        facts = fields(line)
        if "JobState" in facts:
            restarts = int(facts.get("Restarts", "0") or 0)
            words = (facts["JobState"], facts.get("Reason", "None"))
            nodes = facts.get("NodeList", "").replace("(null)", "")
            found.append(JobState(job, facts.get("ArrayTaskId"), *words, restarts, nodes, facts.get("ExitCode", "")))
    return found


def _from_accounting(job: str) -> list[JobState]:
    """The same from sacct; [] where there is no accounting, or it does not know the job either."""
    try:
        text = call("sacct", "-n", "-P", "-X", "-j", job, "-o", "JobID,State,NodeList,ExitCode")
    except UserError:
        return []
    rows = (line.split("|") for line in text.splitlines() if line.count("|") == 3)
    return [
        JobState(job, name.partition("_")[2] or None, state.split()[0], "None", 0, nodes, code)
        for name, state, nodes, code in rows
        if state
    ]


def partitions() -> dict[str, dict[str, str]]:
    """Facts of each partition by its name. Raises UserError."""
    lines = (fields(line) for line in call("scontrol", "show", "partition", "-a", "-o").splitlines())
    return {facts["PartitionName"]: facts for facts in lines if "PartitionName" in facts}


def nodes_away() -> int:
    """Nodes of the cluster that take no jobs now. Raises UserError."""
    lines = call("sinfo", "-h", "-N", "-a", "-o", "%N %T").splitlines()
    states = dict(line.split(" ", 1) for line in lines if " " in line)
    return sum(bool(re.search(r"down|drain|fail|maint|unk|\*", state)) for state in states.values())


def accounts() -> set[str]:
    """Accounts of this user. Raises UserError where there is no accounting, or it does not answer."""
    user = getpass.getuser()
    text = call("sacctmgr", "-n", "-P", "show", "associations", "where", f"user={user}", "format=account")
    return {line.strip() for line in text.splitlines() if line.strip()}


def fields(line: str) -> dict[str, str]:
    """Key=value pairs of a line of `scontrol -o`; of keys that come twice the first."""
    found: dict[str, str] = {}
    for key, value in re.findall(r"(?:^|\s)([\w/:]+)=(\S*)", line):
        found.setdefault(key, value)
    return found
