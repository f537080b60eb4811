"""A request to stop is remembered, honoured once, and a second one is not held up."""

import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from mm_train import stopping
from mm_train.stopping import STOPPED, StopRequest


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_is_a_reason_on_every_rank_and_handlers_are_given_back(tmp_path, number):
    before = signal.getsignal(number)
    with StopRequest(tmp_path, is_main=False) as stop:
        assert stop.wanted() is None
        os.kill(os.getpid(), number)
        assert stop.wanted() == number.name
        os.kill(os.getpid(), number)  # the same request by another way: a launcher passes on what the group got too
        assert stop.wanted() == number.name
    assert signal.getsignal(number) is before


def test_the_first_reason_stays(tmp_path):
    with StopRequest(tmp_path, is_main=True, poll_seconds=0) as stop:
        (tmp_path / "STOP").touch()
        assert stop.wanted() == f"the file {tmp_path / 'STOP'}"
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stop.wanted() == "SIGUSR1"  # what came by signal is of no doubt


def test_only_the_main_rank_looks_for_the_file_and_takes_it_away(tmp_path):
    file = tmp_path / "STOP"
    file.touch()
    with StopRequest(tmp_path, is_main=False, poll_seconds=0) as stop:
        assert stop.wanted() is None
        stop.honoured()
    assert file.exists()
    with StopRequest(tmp_path, is_main=True, poll_seconds=0) as stop:
        assert stop.wanted()
        stop.honoured()
        stop.honoured()
    assert not file.exists()


def test_a_run_folder_that_is_not_there_yet_asks_for_nothing(tmp_path):
    with StopRequest(tmp_path / "later", is_main=True, poll_seconds=0) as stop:
        assert stop.wanted() is None
        (tmp_path / "later").mkdir()
        (tmp_path / "later" / "STOP").touch()
        assert stop.wanted()


def test_the_file_is_looked_for_at_most_every_second(tmp_path, monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping, "time", SimpleNamespace(monotonic=lambda: now[0]))
    with StopRequest(tmp_path, is_main=True) as stop:
        assert stop.wanted() is None
        (tmp_path / "STOP").touch()
        now[0] += 0.9
        assert stop.wanted() is None
        now[0] += 0.1
        assert stop.wanted()


def test_a_step_pays_next_to_nothing(tmp_path):
    with StopRequest(tmp_path, is_main=True) as stop:
        began = time.process_time()
        for _ in range(10_000):
            stop.wanted()
        assert (time.process_time() - began) / 10_000 < 10e-6


CHILD = """
import sys, time
from mm_train import stopping
stopping.SAME_REQUEST_SECONDS = 0.2
with stopping.StopRequest(sys.argv[1], is_main=True) as stop:
    print("ready", flush=True)
    while not stop.wanted():
        time.sleep(0.01)
    print(stop.wanted(), flush=True)
    time.sleep(60)  # a checkpoint that takes for ever
"""


def test_the_same_request_again_ends_the_process_and_another_one_does_not(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", CHILD, tmp_path], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n"
        time.sleep(0.3)
        process.send_signal(signal.SIGTERM)  # what batch systems send at the time limit, SIGUSR1 being the warning
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == -signal.SIGTERM
    finally:
        process.kill()
        process.communicate()


def test_the_exit_status_is_the_one_for_trying_again():
    assert STOPPED == 75 == os.EX_TEMPFAIL
    assert stopping.SIGNALS == (signal.SIGTERM, signal.SIGUSR1)
