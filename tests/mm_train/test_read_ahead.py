import subprocess
import threading
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_train.read_ahead import ReadAhead

ROOT = Path(__file__).parents[2]


@given(st.lists(st.lists(st.integers(0, 20), unique=True, max_size=6), max_size=6), st.integers(1, 4))
def test_results_come_in_the_order_asked_for(requests, workers):
    reading = ReadAhead(lambda key: key * key, workers)
    for now, soon in zip(requests, [*requests[1:], []], strict=False):
        assert list(reading.take(now, soon)) == [key * key for key in now]
    reading.close()


def test_no_more_is_made_than_was_asked_for():
    made = []
    reading = ReadAhead(lambda key: made.append(key) or key, 2)
    assert list(reading.take([0, 1], [2, 3])) == [0, 1]
    assert list(reading.take([2, 3], [4])) == [2, 3]
    assert sorted(made)[:4] == [0, 1, 2, 3]  # and 2 and 3 once only
    reading.close()
    assert len(made) in (4, 5)


def test_an_error_comes_where_its_result_would():
    reading = ReadAhead(lambda key: 6 // key, 2)
    results = reading.take([3, 0, 2])
    assert next(results) == 2
    with pytest.raises(ZeroDivisionError):
        next(results)
    reading.close()


def test_what_is_no_longer_wanted_is_not_waited_for():
    gate, begun = threading.Event(), threading.Event()

    def make(key):
        if key == "slow":
            begun.set()
            assert gate.wait(60)
        return key

    reading = ReadAhead(make, 2)
    assert list(reading.take(["a"], ["slow", "b"])) == ["a"]
    assert begun.wait(60)
    assert list(reading.take(["c"])) == ["c"]
    gate.set()
    reading.close()
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_what_was_made_is_forgotten_when_asked_to():
    answer = [1]
    reading = ReadAhead(lambda key: (key, answer[0]), 1)
    assert list(reading.take(["a"], ["b"])) == [("a", 1)]
    assert list(reading.take([], ["b", "c"])) == []
    answer[0] = 2
    reading.forget()
    assert list(reading.take(["b", "c"])) == [("b", 2), ("c", 2)]
    reading.close()


def test_a_program_ends_although_nobody_closed_it(python):
    code = (
        "import time; from mm_train.read_ahead import ReadAhead; r = ReadAhead(lambda key: time.sleep(0.1) or key, 2);"
        " print(list(r.take([1], range(2, 8))))"
    )
    done = subprocess.run([python, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "[1]", "")
