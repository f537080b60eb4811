"""A process that hangs ends itself, says where it was, and names the ranks that are behind."""

import faulthandler
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mm_train import watchdog
from mm_train.watchdog import HUNG, LEFT, Watchdog, compare, read_heartbeat, stacks

ROOT = Path(__file__).parents[2]


def run(code: str, *args: object) -> subprocess.CompletedProcess:
    """`code` in a process of its own, with the module at hand."""
    prelude = "import ctypes, os, sys, time\nfrom mm_train import watchdog\nfrom mm_train.watchdog import Watchdog\n"
    command = [sys.executable, "-c", prelude + code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)


def test_a_main_thread_that_waits_in_c_is_found(tmp_path):
    """libc's sleep through ctypes lets go of Python's lock, as a collective does."""
    done = run(
        "def collective():\n    ctypes.CDLL(None).sleep(60)\n"
        "w = Watchdog(sys.argv[1], 3, 4, 1)\nw.beat(17, 'backward')\ncollective()",
        tmp_path,
    )
    assert done.returncode == HUNG
    file = tmp_path / "stacks" / "rank-00003.txt"
    first, second = done.stderr.splitlines()[:2]
    where = re.escape(f"in backward of step 17; stacks in {file}; rank 0 has no heartbeat")
    assert re.match(rf"rank 3: no progress for \d+ s {where}", first)
    assert second == "thread MainThread (most recent call last):"
    assert "in collective" in done.stderr
    assert "in collective" in file.read_text()
    assert "watchdog" not in done.stderr.split("MainThread")[1]  # its own threads are no news


def test_a_main_thread_that_holds_pythons_lock_is_found_by_the_backstop(tmp_path):
    """PyDLL calls keep the lock: no thread of Python runs any more."""
    done = run(
        "watchdog.BACKSTOP_SECONDS = 1.0\n"
        "def stuck():\n    ctypes.PyDLL(None).sleep(60)\n"
        "w = Watchdog(sys.argv[1], 0, 1, 1)\nw.beat(5, 'data')\nstuck()",
        tmp_path,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("Timeout (0:00:02)!")
    assert "in stuck" in done.stderr


def test_a_watchdog_that_is_stuck_itself_is_ended_by_the_backstop(tmp_path):
    """Reading the others' heartbeats from a file system that hangs."""
    done = run(
        "watchdog.BACKSTOP_SECONDS = 1.0\nwatchdog.read_heartbeat = lambda *_: time.sleep(60)\n"
        "w = Watchdog(sys.argv[1], 0, 2, 1)\ntime.sleep(60)",
        tmp_path,
    )
    assert done.returncode == 1
    assert "Timeout (0:00:01)!" in done.stderr


def test_beats_keep_it_quiet_and_the_process_leaves_when_it_is_done(tmp_path):
    done = run(
        "w = Watchdog(sys.argv[1], 0, 1, 3)\nfor i in range(1, 13):\n    w.beat(i, 'data')\n    time.sleep(0.3)\n"
        "print('through')",
        tmp_path,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "through\n", "")  # never closed, and not kept alive


# A watchdog that trips ends this very process: those below have an hour.


def test_closed_or_off_it_watches_nothing(tmp_path, monkeypatch):
    timers: list[str] = []
    monkeypatch.setattr(faulthandler, "dump_traceback_later", lambda *_, **__: timers.append("armed"))
    monkeypatch.setattr(faulthandler, "cancel_dump_traceback_later", lambda: timers.append("cancelled"))
    with Watchdog(tmp_path / "off", 0, 1, 0) as off:
        off.beat(1, "data")
    assert not (tmp_path / "off").exists()
    assert not timers
    dog = Watchdog(tmp_path, 0, 1, 3600)
    dog.beat(4, "optimizer")
    dog.close()
    dog.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("watchdog")]
    assert timers == ["armed", "cancelled"]
    beat = read_heartbeat(tmp_path, 0)
    assert (beat["step"], beat["phase"]) == (4, LEFT)


def wait_for_heartbeat(run_dir: Path, rank: int, step: int, phase: str) -> None:
    deadline = time.monotonic() + 30
    while not {"step": step, "phase": phase}.items() <= (read_heartbeat(run_dir, rank) or {}).items():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_heartbeats_say_where_a_rank_is(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    with Watchdog(tmp_path, 2, 4, 3600) as dog:
        for step, phase in ((1, "forward"), (2, "validation")):
            dog.beat(step, phase)
            wait_for_heartbeat(tmp_path, 2, step, phase)
    record = json.loads((tmp_path / "heartbeat" / "rank-00002.json").read_text())
    assert record["pid"] == os.getpid()


def test_there_are_heartbeats_when_there_is_a_run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(watchdog, "HEARTBEAT_SECONDS", 0.02)
    with Watchdog(tmp_path / "failed", 0, 1, 3600) as dog:
        dog.beat(0, "building the model")
        time.sleep(0.1)
    assert not (tmp_path / "failed").exists()
    with Watchdog(tmp_path / "run", 0, 1, 3600) as dog:
        dog.beat(0, "building the model")
        (tmp_path / "run").mkdir()
        wait_for_heartbeat(tmp_path / "run", 0, 0, "building the model")


def test_a_folder_that_cannot_be_written_stops_nothing(tmp_path):
    with Watchdog("/proc", 0, 1, 3600) as dog:
        dog.beat(1, "data")
    (tmp_path / "heartbeat").mkdir()
    (tmp_path / "heartbeat" / "rank-00001.json").write_text("{torn")
    assert read_heartbeat(tmp_path, 1) is None


def test_a_beat_costs_next_to_nothing(tmp_path):
    with Watchdog(tmp_path, 0, 1, 3600) as dog:
        began = time.process_time()
        for step in range(20_000):
            dog.beat(step, "forward")
        assert (time.process_time() - began) / 20_000 < 10e-6


def test_a_suspended_rank_is_named_by_the_one_that_waits(tmp_path):
    """Two processes: one is stopped by SIGSTOP, the other trips and says which."""
    code = (
        "import sys, time\nfrom mm_train import watchdog\nwatchdog.HEARTBEAT_SECONDS = 0.1\nrank = int(sys.argv[2])\n"
        "w = watchdog.Watchdog(sys.argv[1], rank, 2, [60, 2][rank])\nw.beat(7 + rank, 'data')\n"
        "while True:\n    time.sleep(0.05)\n    if rank == 0: w.beat(7, 'data')"
    )
    command = [sys.executable, "-c", code, str(tmp_path)]
    pipes = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    stopped = subprocess.Popen([*command, "0"], **pipes)
    started = [stopped]
    try:
        wait_for_heartbeat(tmp_path, 0, 7, "data")
        stopped.send_signal(signal.SIGSTOP)
        waiting = subprocess.Popen([*command, "1"], **pipes)
        started.append(waiting)
        errors = waiting.communicate(timeout=60)[1]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert waiting.returncode == HUNG
    assert re.search(r"; rank 0 is silent since data of step 7, \d+ s ago$", errors.splitlines()[0])


@pytest.mark.parametrize(
    ("beats", "text"),
    [
        ({1: (17, "forward", 0), 2: (17, "forward", 1)}, ""),
        ({1: (17, "forward", 0), 2: (16, "data", 1)}, "rank 2 is still in data of step 16"),
        ({1: (17, "data", 0), 2: (16, "data", 1)}, "rank 2 is still in data of step 16, rank 1 is in data of step 17"),
        ({1: (7, "data", 40), 2: None},
         "rank 2 has no heartbeat, rank 1 is silent since data of step 7, 40 s ago"),
        ({1: (9, LEFT, 0), 2: (18, "data", 0)}, "rank 1 has left in step 9, rank 2 is in data of step 18"),
    ],
)  # fmt: skip
def test_ranks_are_compared(beats, text):
    read = {
        rank: beat and {"step": beat[0], "phase": beat[1], "time": 1000.0 - beat[2]} for rank, beat in beats.items()
    }
    assert compare(17, "forward", read, now=1000.0, silent_after=30) == text


def test_a_message_about_many_ranks_stays_short():
    beats = {rank: {"step": 3, "phase": "data", "time": 0.0} for rank in range(1, 500)}
    text = compare(4, "forward", beats, now=1.0, silent_after=30)
    assert text.count(", ") == watchdog.NAMED_RANKS
    assert text.endswith("491 more ranks differ")


def test_stacks_name_every_thread():
    release = threading.Event()
    thread = threading.Thread(target=release.wait, name="writer")
    thread.start()
    text, without = stacks(), stacks(leave_out=[thread])
    release.set()
    thread.join()
    headings = [line for line in text.splitlines() if line.startswith("thread ")]
    assert headings[0] == "thread MainThread (most recent call last):"
    assert "thread writer (most recent call last):" in headings
    assert "test_stacks_name_every_thread" in text
    assert "thread writer (most" not in without
