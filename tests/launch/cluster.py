"""A real SLURM on this machine, for tests: munge, slurmctld and three slurmd on loopback, all in one folder.

    python -m tests.launch.cluster FOLDER      keep one up until Ctrl-C, to try things by hand

Nothing outside the folder is touched and nothing has to run beforehand. All nodes are this host, with as many CPUs as
the configuration claims. Times are short (a lost node is missed after 10 s, a requeued job may start after 5 s), so
that what takes minutes on a real cluster shows within a test. There is no accounting database, hence no sacct.
"""

import contextlib
import getpass
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "sinfo", "scancel")
# PREEMPTED is not among them: it is shown while the job may still leave by itself, and it is requeued then.
OVER = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "DEADLINE", "BOOT_FAIL"}

CONF = """\
ClusterName=mmtest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={port}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# cred_expire is also how long a requeued job waits before it may start (120 s if it is not said)
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
JobContainerType=job_container/none
MpiDefault=none
SwitchType=switch/none
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,sched_min_interval=0,bf_interval=1,batch_sched_delay=0
SlurmdTimeout=10
SlurmctldTimeout=15
KillWait=3
InactiveLimit=0
MinJobAge=3600
# jobs choose their ports by their ids: those of two clusters at a time must differ
FirstJobId={port}00
ReturnToService=2
JobRequeue=1
OverTimeLimit=0
CompleteWait=0
MessageTimeout=10
TCPTimeout=2
UnkillableStepTimeout=15
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SlurmctldParameters=preempt_send_user_signal
JobCompType=jobcomp/none
AccountingStorageType=accounting_storage/none
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.%n.log
SlurmctldDebug=info
SlurmdDebug=info
{nodes}
PartitionName=train Nodes=ALL Default=YES MaxTime=INFINITE PriorityTier=1 GraceTime=60 OverSubscribe=NO State=UP
PartitionName=urgent Nodes=ALL MaxTime=INFINITE PriorityTier=10 PreemptMode=OFF OverSubscribe=NO State=UP
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 RealMemory=8000 State=UNKNOWN"


def missing() -> str | None:
    """Why no cluster can be started here; None when one can."""
    absent = [name for name in PROGRAMS if _program(name) is None]
    if absent:
        return f"SLURM is not installed ({', '.join(absent)}): apt-get install munge slurmctld slurmd slurm-client"
    if os.geteuid() != 0:
        return "slurmd has to run as root"
    return None


class Cluster:
    """Starts on entry, and leaves no process behind.

    Args:
        folder: new or empty; the socket in it must have a path of less than 100 characters.
    """

    def __init__(self, folder: Path, nodes: int = 3) -> None:
        self.folder = folder.resolve()
        self.nodes = [f"node{number}" for number in range(1, nodes + 1)]
        self.environment = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_", "MM_"))}
        self.environment |= {"SLURM_CONF": str(self.folder / "slurm.conf"), "OMP_NUM_THREADS": "1"}

    def __enter__(self) -> "Cluster":
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            if (self.folder / "slurmctld.pid").exists():
                self.run("scancel", "--user", getpass.getuser(), timeout=10)
                time.sleep(1)
        for name in [*(f"slurmd.{node}" for node in self.nodes), "slurmctld", "munged"]:
            self._end(name)
        self._end_steps()

    # --- jobs -----------------------------------------------------------------------------------------------------

    def run(self, *command: str | Path, timeout: float = 60, cwd: Path | None = None, **variables: str) -> str:
        """What a command prints. Raises AssertionError with its errors when it fails."""
        done = subprocess.run(
            [str(word) for word in command],
            env=self.environment | variables,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=timeout,
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def submit(self, *words: str | Path, cwd: Path | None = None, **variables: str) -> str:
        """Job id of `sbatch WORDS`."""
        return self.run("sbatch", "--parsable", *words, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What scontrol says of a job: JobState, Restarts, NodeList, ..."""
        text = self.run("scontrol", "--oneliner", "show", "job", job)
        return dict(re.findall(r"(\w+)=(\S*)", text))

    def wait(self, job: str, timeout: float = 120) -> dict[str, str]:
        """The job when it is over. Raises TimeoutError."""
        return self.until(lambda: (facts := self.job(job))["JobState"] in OVER and facts, timeout, f"job {job}")

    def until(self, condition, timeout: float, what: str):
        """The first true value of `condition`. (`sbatch --wait` would look only every half minute or so.)"""
        end = time.monotonic() + timeout
        while not (value := condition()):
            if time.monotonic() > end:
                raise TimeoutError(f"{what}: nothing after {timeout:.0f} s\n{self.run('scontrol', 'show', 'job')}")
            time.sleep(0.2)
        return value

    # --- nodes ----------------------------------------------------------------------------------------------------

    def kill_node(self, node: str) -> None:
        """SIGKILL for a slurmd: to SLURM the node stops answering; what it had started lives on."""
        self._end(f"slurmd.{node}", signal.SIGKILL)

    def start_node(self, node: str) -> None:
        subprocess.run([_program("slurmd"), "-N", node], env=self.environment, check=True, timeout=30)

    def wait_idle(self, timeout: float = 60) -> None:
        """Until every node can take a job."""

        def idle() -> bool:
            return self.run("sinfo", "-h", "-N", "-p", "train", "-o", "%T").split() == ["idle"] * len(self.nodes)

        self.until(idle, timeout, "idle nodes")

    # --- daemons --------------------------------------------------------------------------------------------------

    def _start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.folder.chmod(0o755)  # munge wants a path to its socket that others may not write
        for name in ("state", *(f"spool/{node}" for node in self.nodes)):
            (self.folder / name).mkdir(parents=True, exist_ok=True)
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        host = socket.gethostname().split(".")[0]
        port = _free_ports(1 + len(self.nodes))
        nodes = [
            NODE.format(name=node, host=host, port=port + number) for number, node in enumerate(self.nodes, start=1)
        ]
        facts = {"host": host, "port": port, "user": getpass.getuser(), "folder": self.folder}
        (self.folder / "slurm.conf").write_text(CONF.format(nodes="\n".join(nodes), **facts))
        here = f"--key-file={key}", f"--socket={self.folder}/munge.sock", f"--pid-file={self.folder}/munged.pid"
        logs = f"--log-file={self.folder}/munged.log", f"--seed-file={self.folder}/munge.seed", "--num-threads=2"
        self._daemon("munged", "--force", *here, *logs)  # --force: a folder of root's own is good enough here
        self._daemon("slurmctld", "-c")
        for node in self.nodes:
            self.start_node(node)
        self.wait_idle(30)

    def _daemon(self, program: str, *words: str) -> None:
        with (self.folder / f"{program}.start").open("w") as log:  # not a pipe: the daemon keeps it open
            subprocess.run(
                [_program(program), *words], env=self.environment, check=True, timeout=30, stdout=log, stderr=log
            )

    def _end(self, name: str, number: int = signal.SIGTERM) -> None:
        """End a daemon by the id that it wrote down, if that is still a program of this kind."""
        file = self.folder / f"{name}.pid"
        try:
            pid = int(file.read_text())
            program = Path(f"/proc/{pid}/comm").read_text().strip()
        except (OSError, ValueError):
            return
        if program not in ("munged", "slurmctld", "slurmd"):
            return
        end = time.monotonic() + 10
        while _alive(pid):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number if time.monotonic() < end else signal.SIGKILL)
            time.sleep(0.1)
        file.unlink(missing_ok=True)

    def _end_steps(self) -> None:
        """What slurmd started and no longer looks after: processes that carry this cluster in their environment."""
        mark = f"SLURM_CONF={self.folder}/slurm.conf".encode()
        for path in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                job = b"\0SLURM_JOB_ID=" in (environment := (path / "environ").read_bytes())
                step = (path / "comm").read_text().startswith("slurmstepd")
                if mark in environment.split(b"\0") and (job or step) and int(path.name) != os.getpid():
                    os.kill(int(path.name), signal.SIGKILL)


def _program(name: str) -> str | None:
    return shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def _free_ports(number: int) -> int:
    """The first of so many ports in a row that nobody uses."""
    for first in range(26817 + os.getpid() % 1000 * number, 32000, number):
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            for port in range(first, first + number):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise OSError("no free ports")


if __name__ == "__main__":
    with Cluster(Path(sys.argv[1])) as cluster:
        print(f"export SLURM_CONF={cluster.environment['SLURM_CONF']}", flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            signal.pause()
