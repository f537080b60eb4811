"""The chosen steps, and only those, end up in a trace and a table."""

import gzip
import json

import pytest
import torch

from mm_train.profiling import REST, SHOWN, STEP, Profiler, Row, render

CPU = torch.device("cpu")


def work() -> None:
    a = torch.randn(64, 64, requires_grad=True)
    (a @ a).sum().backward()


def run(profiler: Profiler, first: int, last: int) -> None:
    for step in range(first, last + 1):
        profiler.begin(step)
        work()
        profiler.end(step)
    profiler.close()
    profiler.close()


def test_the_trace_holds_the_chosen_steps_with_shapes_and_memory(tmp_path):
    said: list[str] = []
    run(Profiler("3-4", tmp_path, 0, CPU, said.append), 1, 6)
    with gzip.open(tmp_path / "profile" / "rank-00000.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    assert sum(e.get("name") == STEP and e.get("cat") == "user_annotation" for e in events) == 2
    products = [e for e in events if e.get("name") == "aten::mm"]
    assert len(products) == 2 * 3  # forward, and backward to each factor
    assert products[0]["args"]["Input Dims"][:2] == [[64, 64], [64, 64]]
    assert any(e.get("name") == "[memory]" for e in events)
    assert sorted(p.name for p in (tmp_path / "profile").iterdir()) == ["rank-00000.trace.json.gz", "top.txt"]

    table = (tmp_path / "profile" / "top.txt").read_text().splitlines()
    assert table[0].startswith("profile of 2 step(s), ")
    assert said[: len(table[: 2 + SHOWN])] == table[: 2 + SHOWN]
    assert str(tmp_path / "profile" / "top.txt") in said[-1]
    line = next(line.split() for line in table if line.endswith("  aten::mm"))
    assert line[2] == "3"
    assert any(line.endswith(REST) for line in table)
    shares = [float(line.split()[1].rstrip("%")) for line in table[2:]]
    assert shares == sorted(shares, reverse=True)
    assert sum(shares) == pytest.approx(100, abs=5)


@pytest.mark.parametrize(("steps", "rank"), [("", 0), ("1-3", 1)])
def test_without_steps_or_on_another_rank_nothing_happens(tmp_path, steps, rank):
    said: list[str] = []
    run(Profiler(steps, tmp_path, rank, CPU, said.append), 1, 3)
    assert said == []
    assert list(tmp_path.iterdir()) == []


def test_steps_that_are_over_are_told_once(tmp_path):
    said: list[str] = []
    run(Profiler("3-4", tmp_path, 0, CPU, said.append), 5, 9)
    assert said == ["warning: no profile: steps 3-4 are over, this is step 5 (profile.steps)"]
    assert list(tmp_path.iterdir()) == []


def test_a_run_resumed_in_the_middle_records_the_rest(tmp_path):
    said: list[str] = []
    run(Profiler("3-6", tmp_path, 0, CPU, said.append), 5, 9)
    assert said[0].startswith("profile of 2 step(s)")


def test_a_run_that_ends_early_leaves_what_there_is(tmp_path):
    said: list[str] = []
    run(Profiler("3-60", tmp_path, 0, CPU, said.append), 1, 3)
    assert said[0].startswith("profile of 1 step(s)")
    assert (tmp_path / "profile" / "rank-00000.trace.json.gz").exists()
    said.clear()
    run(Profiler("30-60", tmp_path, 0, CPU, said.append), 1, 3)
    assert said == ["warning: no profile: the run ended before step 30 (profile.steps 30-60)"]


def test_steps_beyond_the_run_are_told_at_the_start(tmp_path):
    said: list[str] = []
    run(Profiler("3-6", tmp_path, 0, CPU, said.append, total_steps=2), 1, 2)
    assert said == ["warning: no profile: the run ends at step 2 (profile.steps 3-6)"]
    assert list(tmp_path.iterdir()) == []
    said.clear()
    run(Profiler("3-6", tmp_path, 0, CPU, said.append, total_steps=4), 1, 4)
    assert said[0] == "warning: the profile will be shorter: the run ends at step 4 (profile.steps 3-6)"
    assert said[1].startswith("profile of 2 step(s)")
    said.clear()
    for rank, steps in ((1, "3-6"), (0, "3-4"), (0, "")):
        Profiler(steps, tmp_path, rank, CPU, said.append, total_steps=4)
    assert said == []


def test_a_run_that_fails_within_a_step_still_leaves_a_profile(tmp_path):
    said: list[str] = []
    profiler = Profiler("1-5", tmp_path, 0, CPU, said.append)
    profiler.begin(1)
    work()
    profiler.close()
    assert said[0].startswith("profile of 1 step(s)")


def test_a_profile_that_cannot_be_written_ends_nothing(tmp_path):
    said: list[str] = []
    run(Profiler("1", "/proc/nothing", 0, CPU, said.append), 1, 3)
    assert len(said) == 1
    assert said[0].startswith("warning: the profile fails, training goes on: ")


def test_the_numbers_are_not_changed_by_looking(tmp_path):
    results = []
    for steps in ("", "1-2"):
        torch.manual_seed(0)
        profiler = Profiler(steps, tmp_path, 0, CPU, lambda _: None)
        weight = torch.randn(32, 32, requires_grad=True)
        for step in (1, 2, 3):
            profiler.begin(step)
            (weight @ torch.randn(32, 8)).square().mean().backward()
            profiler.end(step)
        results.append(weight.grad)
    assert torch.equal(*results)


def test_the_table_counts_by_step():
    rows = [Row("aten::mm", 0.030, 60), Row("aten::copy_", 0.010, 5)]
    assert render(rows, 2, "cuda") == [
        "profile of 2 step(s), 0.020 s of GPU a step; operators by their own time:",
        " ms a step  share calls a step  operator",
        "     15.00  75.0%           30  aten::mm",
        "      5.00  25.0%          2.5  aten::copy_",
    ]
