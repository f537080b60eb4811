"""launch/local.sh: N processes, signals passed on, one clear error, the status of the first that fails, no orphans."""

import os
import platform
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launch.local import STOPPED
from mm_train import config, stopping
from mm_train.fault_run import alive
from mm_train.metrics import read_metrics

ROOT = Path(__file__).parents[2]

# A rank that says who it is and does what it is told, in place of training: what is tested is who starts and ends it.
RANK = """
import os, signal, sys, time
rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
def leave(status):
    sys.stdout.flush()
    os._exit(status)
def say(*words):  # one write, so that lines of several ranks do not mix
    os.write(1, (" ".join(map(str, words)) + "\\n").encode())
def on(number, action):
    signal.signal(number, lambda *_: (say("rank", rank, signal.Signals(number).name), action()))
"""
WAIT = "say('up', rank, os.getpid())\nwhile True: time.sleep(0.05)\n"
START = (
    "import sys\nfrom launch import local\nlocal.MODULE = ['-c', {code!r}]\n{more}\nsys.exit(local.main(['{ranks}']))"
)


class Launched:
    """launch/local.py with the code of a rank instead of mm_train.train, in a process of its own."""

    def __init__(self, code: str, ranks: int, more: str = "", up: bool = True, **how) -> None:
        text = START.format(code=RANK + code, more=more, ranks=ranks)
        command = [*how.pop("wrapper", []), sys.executable, "-c", text]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, cwd=ROOT, **pipes, **how)
        self.pids: dict[int, int] = {}
        while up and len(self.pids) < ranks:
            _, rank, pid = self.process.stdout.readline().split()
            self.pids[int(rank)] = int(pid)

    def end(self, timeout: float = 30) -> tuple[int, str, str]:
        """(exit status, stdout, stderr) when it has ended, which no rank may outlive."""
        try:
            output, errors = self.process.communicate(timeout=timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()  # and the kernel the ranks
            self.process.communicate()
            raise
        assert gone(self.pids.values()), "a rank is left"
        return self.process.returncode, output, errors


def gone(pids, seconds: float = 5) -> bool:
    """Have these processes ended (within a moment: a signal of the kernel takes its time)?"""
    deadline = time.monotonic() + seconds
    while any(alive(pid) for pid in pids):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def local(*args: str) -> subprocess.CompletedProcess:
    return subprocess.run([ROOT / "launch/local.sh", *args], capture_output=True, text=True)


@pytest.mark.parametrize("args", [(), ("two",), ("0", "x.yaml")])
def test_without_a_number_of_processes_it_explains_itself(args):
    done = local(*args)
    assert done.returncode == 2
    assert done.stderr.startswith("usage: launch/local.sh NUM_PROCESSES")


def test_ranks_know_their_place():
    code = "say(rank, world, os.environ['LOCAL_RANK'], os.environ['MASTER_ADDR'], os.environ['OMP_NUM_THREADS'])"
    status, output, errors = Launched(code, 3, up=False, env=os.environ | {"OMP_NUM_THREADS": "2"}).end()
    assert (status, errors) == (0, "")
    assert sorted(output.splitlines()) == [f"{rank} 3 {rank} 127.0.0.1 2" for rank in range(3)]


def test_the_first_failure_ends_the_others_and_is_the_exit_status():
    launched = Launched("on(signal.SIGTERM, lambda: leave(9))\non(signal.SIGUSR2, lambda: leave(7))\n" + WAIT, 3)
    os.kill(launched.pids[1], signal.SIGUSR2)
    status, output, errors = launched.end()
    assert (status, errors) == (7, "")
    assert "rank 0 SIGTERM" in output
    assert "rank 2 SIGTERM" in output


def test_a_killed_rank_is_named_and_those_that_do_not_listen_are_killed():
    launched = Launched("on(signal.SIGTERM, lambda: None)\n" + WAIT, 3, more="local.GRACE_SECONDS = 0.5")
    os.kill(launched.pids[1], signal.SIGKILL)
    status, output, errors = launched.end()
    assert status == 137
    assert errors == "launch/local.sh: rank 1 was ended by SIGKILL; ending the others\n"
    assert "rank 0 SIGTERM" in output


def test_a_stopped_process_is_ended_too():
    """SIGSTOP holds SIGTERM up, and SIGKILL not."""
    launched = Launched(WAIT, 2, more="local.GRACE_SECONDS = 0.5")
    os.kill(launched.pids[0], signal.SIGSTOP)
    os.kill(launched.pids[1], signal.SIGKILL)
    assert launched.end()[0] == 137


@pytest.mark.parametrize(
    ("sent", "received"),
    [(signal.SIGTERM, "SIGTERM"), (signal.SIGUSR1, "SIGUSR1"), (signal.SIGHUP, "SIGTERM")],
)
def test_requests_to_stop_are_passed_on_and_waited_for(sent, received):
    """Ranks take their time, one more than the other: nobody is hurried."""
    code = f"on(signal.{received}, lambda: (time.sleep(0.2 + 0.6 * rank), leave(75)))\n" + WAIT
    launched = Launched(code, 2)
    launched.process.send_signal(sent)
    status, output, errors = launched.end()
    assert (status, errors) == (STOPPED, "")
    assert sorted(output.splitlines()) == [f"rank {rank} {received}" for rank in range(2)]
    assert stopping.STOPPED == STOPPED


def test_a_failure_while_stopping_is_the_exit_status():
    code = "on(signal.SIGTERM, lambda: (time.sleep(0.3 * rank), leave(75 if rank == 0 else 3)))\n" + WAIT
    launched = Launched(code, 2)
    launched.process.terminate()
    assert launched.end()[0] == 3


def test_ctrl_c_in_a_terminal_reaches_every_rank_once():
    """A terminal sends SIGINT to the whole process group."""
    code = "on(signal.SIGINT, lambda: (time.sleep(0.5), leave(130)))\n" + WAIT
    launched = Launched(code, 2, more="local.CTRL_C_SECONDS = 30", start_new_session=True)
    os.killpg(launched.process.pid, signal.SIGINT)
    status, output, _ = launched.end()
    assert status == 130
    assert sorted(output.splitlines()) == ["rank 0 SIGINT", "rank 1 SIGINT"]


def test_an_interrupt_of_the_launcher_alone_is_passed_on():
    code = "on(signal.SIGINT, lambda: leave(130))\non(signal.SIGTERM, lambda: None)\n" + WAIT
    launched = Launched(code, 2, more="local.CTRL_C_SECONDS = 0.2")
    launched.process.send_signal(signal.SIGINT)
    assert launched.end()[0] == 130


def test_a_second_ctrl_c_does_not_wait():
    code = "on(signal.SIGINT, lambda: None)\n" + WAIT
    launched = Launched(code, 2, more="local.CTRL_C_SECONDS = 60", start_new_session=True)
    os.killpg(launched.process.pid, signal.SIGINT)
    time.sleep(0.5)
    os.killpg(launched.process.pid, signal.SIGINT)
    assert launched.end()[0] == 130


def test_ranks_die_with_a_launcher_that_is_killed():
    launched = Launched("on(signal.SIGTERM, lambda: None)\n" + WAIT, 3)
    launched.process.kill()
    launched.process.communicate(timeout=10)
    assert gone(launched.pids.values())


def test_under_nohup_a_closed_terminal_is_ignored():
    launched = Launched("time.sleep(0.5)\nsay('up', rank, os.getpid())\ntime.sleep(1)\n", 1, wrapper=["nohup"])
    launched.process.send_signal(signal.SIGHUP)
    os.kill(launched.pids[0], signal.SIGHUP)
    assert launched.end()[0] == 0


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


def test_two_processes_stop_together_and_the_same_command_continues(small_config, tmp_path):
    """SIGTERM in the middle: both ranks save the same step, and nothing is done twice."""
    small_config.parallel.expert_parallel = 2
    small_config.checkpoint.every = 1000
    small_config.train.tokens = (steps := 100) * 512  # enough for a signal that takes its time
    config.save(small_config, tmp_path / "cfg.yaml")
    command = [ROOT / "launch/local.sh", "2", tmp_path / "cfg.yaml"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stdout if re.search(rf"step +3/{steps}", line))
        process.terminate()
        rest, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert process.returncode == STOPPED, errors[-2000:]
    step = int(re.search(r"stopped after step (\d+): SIGTERM", rest).group(1))
    assert 3 <= step < steps
    done = local("2", str(tmp_path / "cfg.yaml"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert f"resuming after step {step} " in done.stdout
    assert [record["step"] for record in read_metrics(small_config.run.dir)["train"]] == list(range(1, steps + 1))


def test_another_module_than_training():
    done = subprocess.run([ROOT / "launch/local.sh", "2", "-m", "platform", "terse"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stdout.replace("\n", "") == platform.platform(True, True) * 2  # both at once, hence in any order
