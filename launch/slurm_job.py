"""What a batch script asks of SLURM: which job it is, on which nodes, how to reach them; and to start it once more.

Only the standard library and SLURM's own commands.
"""

import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mm_train.cli import UserError

COMMAND_SECONDS = 60.0  # a busy slurmctld takes its time
FIRST_PORT, PORTS = 10000, 11000  # two for each job, below the range from which systems hand out ports


@dataclass(frozen=True)
class Job:
    """This job, in this start."""

    id: str
    restarts: int  # starts before this one
    nodes: tuple[str, ...]
    partition: str

    @staticmethod
    def read(environment: Mapping[str, str]) -> "Job":
        """Raises UserError outside of a job."""
        if "SLURM_JOB_ID" not in environment:
            raise UserError(
                "this runs inside a SLURM job: sbatch launch/slurm_pretrain.sh ... (one machine: launch/local.sh)"
            )
        nodes = tuple(scontrol("show", "hostnames", environment["SLURM_JOB_NODELIST"]).split())
        restarts = int(environment.get("SLURM_RESTART_COUNT") or 0)
        return Job(environment["SLURM_JOB_ID"], restarts, nodes, environment.get("SLURM_JOB_PARTITION", ""))

    @property
    def start(self) -> str:
        """Names this start among all: 123-0, 123-1 after it was requeued."""
        return f"{self.id}-{self.restarts}"

    @property
    def log(self) -> str:
        """Name of the batch script's log in RUN/slurm."""
        return f"{self.id}.log"

    @property
    def config(self) -> str:
        """Name in RUN/slurm of the configuration with which the job trains in all its starts."""
        return f"config-{self.id}.yaml"

    @property
    def port(self) -> int:
        """Where the ranks meet; the next one is free for tests before. Another one after a restart: what is left of the
        start before may still hold the old one."""
        return FIRST_PORT + 2 * ((int(self.id) + 997 * self.restarts) % PORTS)

    def addresses(self, nodes: Sequence[str]) -> dict[str, str]:
        """Where nodes are to be reached from others. Raises UserError when what SLURM says of one is no address."""
        lines = scontrol("--oneliner", "show", "node", ",".join(nodes)).splitlines()
        known = dict(re.findall(r"\bNodeName=(\S+).*?\bNodeAddr=(\S+)", "\n".join(lines)))
        found = {}
        for node in nodes:
            address = known.get(node, node)
            try:
                known_as = socket.getaddrinfo(address, None, type=socket.SOCK_STREAM)
                found[node] = str(min(known_as, key=lambda entry: entry[0] != socket.AF_INET)[4][0])
            except OSError as error:
                raise UserError(
                    f"node {node} has the address {address!r} in SLURM (NodeAddr), which does not resolve here"
                    f" ({error.strerror}): the ranks could not meet"
                ) from None
        return found

    def facts(self) -> dict[str, str]:
        """What SLURM says of the job: JobState, EndTime, Restarts, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", scontrol("--oneliner", "show", "job", self.id)))

    def ends_at(self) -> float | None:
        """When its time is over, in seconds since 1970; None when it has no limit, or SLURM does not answer."""
        try:
            return time.mktime(time.strptime(self.facts().get("EndTime", ""), "%Y-%m-%dT%H:%M:%S"))
        except (UserError, ValueError, OverflowError):
            return None

    def requeue(self) -> str | None:
        """Have SLURM start the job once more; why it was not done, or None. SLURM ends this process soon after.

        A job that is being ended, or that SLURM has requeued by itself, is left alone: to requeue it would undo that.
        """
        facts = self.facts()
        if facts.get("JobState") not in ("RUNNING", "PREEMPTED") or int(facts.get("Restarts") or 0) != self.restarts:
            return f"SLURM has the job as {facts.get('JobState')}, restarts {facts.get('Restarts')}"
        try:
            scontrol("requeue", self.id)
        except UserError as error:
            return str(error)
        return None

    def comment(self, text: str) -> None:
        """Leave a note in SLURM, where there is none; it stays when the job is requeued."""
        try:
            if self.facts().get("Comment", "(null)") == "(null)":
                scontrol("update", f"JobId={self.id}", f"Comment={text}")
        except UserError as error:
            print(f"the job's comment could not be set: {error}", file=sys.stderr, flush=True)

    def exclude(self, nodes: Sequence[str]) -> None:
        """Keep the job, which has just been requeued, off these nodes as well. Raises UserError."""
        before = self.facts().get("ExcNodeList", "(null)")
        names = [*([] if before == "(null)" else [before]), *nodes]
        scontrol("update", f"JobId={self.id}", f"ExcNodeList={','.join(names)}")

    def asked_for(self) -> set[str]:
        """Nodes that the job was submitted for by name."""
        names = self.facts().get("ReqNodeList", "(null)")
        return set() if names == "(null)" else set(scontrol("show", "hostnames", names).split())

    def others(self) -> list[str]:
        """Nodes of the partition that are not down or drained, apart from those of this job."""
        try:
            lines = ask(
                "sinfo", "--noheader", "--Node", "--partition", self.partition, "--format", "%N %t"
            ).splitlines()
        except UserError:
            return []
        usable = {line.split()[0] for line in lines if re.match(r"(idle|mix|alloc|comp|resv|plnd)", line.split()[1])}
        return sorted(usable - set(self.nodes))


def scontrol(*words: str) -> str:
    return ask("scontrol", *words)


def ask(*command: str) -> str:
    """What a command of SLURM prints. Raises UserError when it fails or does not answer."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_SECONDS)
    except OSError as error:
        raise UserError(f"cannot run {command[0]}: {error.strerror}") from None
    except subprocess.TimeoutExpired:
        raise UserError(f"{' '.join(command)}: no answer from SLURM after {COMMAND_SECONDS:.0f} s") from None
    if done.returncode:
        raise UserError(f"{' '.join(command)}: {' '.join((done.stderr or done.stdout).split())}")
    return done.stdout
