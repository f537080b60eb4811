"""Programs that mean harm, each really run. A child that is not contained would be seen from outside."""

import socket
import subprocess
import sys
import time

import pytest

from eval.sandbox import CodeEval, Limits, passes

QUICK = Limits(seconds=2, wall_seconds=60)


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("assert sum([1, 2]) == 3", True),
        ("assert 1 == 2", False),
        ("import sys; sys.exit(0)", False),
        ("import os; os._exit(0)", False),
        ("def f(: pass", False),
        ("import math, re, collections, heapq, itertools, random, threading; random.random()", True),
        ("open('own', 'w').write('x'); assert open('own').read() == 'x'", True),
        ("import threading; t = threading.Thread(target=print); t.start(); t.join()", True),
    ],
)
def test_a_program_passes_when_it_runs_to_its_end(source, expected):
    assert passes(source) is expected


def test_a_fork_bomb_makes_no_process():
    name = f"bomb{time.monotonic_ns()}"
    source = f"""
import os, subprocess, sys
for attempt in (os.fork, lambda: subprocess.run([sys.executable, "-c", "import time; time.sleep(60)", "{name}"])):
    for _ in range(100):
        try:
            attempt()
        except OSError:
            continue
        while True:
            attempt()
"""
    assert passes(source, QUICK)  # every attempt is refused, and it goes on
    found = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert name not in found


def test_nothing_is_written_outside_of_its_folder(tmp_path):
    (tmp_path / "mine").write_text("before")
    source = f"""
import os
ways = [lambda p: open(p, "w"), lambda p: open(p, "a"), os.remove, os.mkdir, lambda p: os.rename(p, "here"),
        lambda p: os.chmod(p, 0), lambda p: os.truncate(p, 0), lambda p: os.symlink("x", p + "2"), os.listdir]
for way in ways:
    for path in ({str(tmp_path / "mine")!r}, {str(tmp_path / "new")!r}, "/etc/passwd", "/usr/new", "../new"):
        try:
            way(path)
        except OSError:
            continue
        raise SystemExit
"""
    assert passes(source, QUICK)
    assert [file.name for file in tmp_path.iterdir()] == ["mine"]
    assert (tmp_path / "mine").read_text() == "before"


def test_ten_gigabytes_are_not_handed_out():
    source = """
try:
    block = bytearray(10 * 2**30)
except MemoryError:
    refused = True
assert refused
"""
    assert passes(source, QUICK)
    assert not passes("x = bytearray(10 * 2**30)", QUICK)


@pytest.mark.parametrize("source", ["while True: pass", "import time; time.sleep(1000)"])
def test_a_program_without_end_is_ended(source):
    started = time.monotonic()
    assert not passes(source, Limits(seconds=1, wall_seconds=8))
    assert time.monotonic() - started < 40


def test_there_is_no_network():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        server.settimeout(0.2)
        source = f"""
import socket
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), timeout=2)
except PermissionError:
    refused = True
assert refused
"""
        assert passes(source, QUICK)
        with pytest.raises(TimeoutError):
            server.accept()


def test_limits_cannot_be_raised_and_others_cannot_be_killed():
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    source = f"""
import os, resource
for attempt in (lambda: resource.setrlimit(resource.RLIMIT_AS, (2**40, 2**40)), lambda: os.kill({victim.pid}, 9)):
    try:
        attempt()
    except (OSError, ValueError):
        continue
    raise SystemExit
"""
    try:
        assert passes(source, QUICK)
        assert victim.poll() is None
    finally:
        victim.kill()
        victim.wait()


def test_a_file_has_a_largest_size():
    assert not passes("open('big', 'wb').write(bytes(2**20))", Limits(seconds=2, file_bytes=2**16))


def test_pass_at_1_is_the_share_that_passes():
    references = ["assert f(2) == 4", "assert f(3) == 9"]
    right, wrong = "def f(x): return x * x", "def f(x): return 2 * x"
    score, found = CodeEval().compute(references, [[right], [wrong]], k=[1])
    assert (score, found) == ({"pass@1": 0.5}, [[True], [False]])
    with pytest.raises(ValueError, match="only pass@1"):
        CodeEval().compute(references, [[right], [wrong]], k=[1, 10])
