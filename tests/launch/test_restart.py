"""Is a job started again? A table of endings, the caps, and the record."""

import json

import pytest

from launch.restart import BAD_NODES, FAILED, Ending, History, Limits, Start, decide, newest_step, refusal

LIMITS = Limits(restarts=4, no_progress=3)


def starts(*steps: int, ended: str | None = FAILED) -> list[Start]:
    """Starts that began at these steps and ended alike; the last one has just ended."""
    made = [Start("7", number, step, ["a", "b"], 2, ended=ended) for number, step in enumerate(steps)]
    made[-1].ended = None
    return made


@pytest.mark.parametrize(
    ("ending", "requeued", "ended", "status", "words"),
    [
        (Ending(0, done=True), False, "done", 0, "done"),
        (Ending(137, done=True), False, "done", 0, "done"),
        (Ending(0, done=True, cancelled=True), False, "done", 0, "done"),
        (Ending(75, warned="time is over"), True, "time", 75, "time is over; training stopped with a checkpoint"),
        (Ending(137, warned="time is over"), True, "time", 137, "was killed by signal 9"),
        (Ending(2, warned="time is over"), True, "time", 2, "bad input"),
        (Ending(75), False, "stopped", 75, "stopped on request"),
        (Ending(75, cancelled=True), False, "cancelled", 143, "scancel"),
        (Ending(75, warned="time is over", cancelled=True), False, "cancelled", 143, "scancel"),
        (Ending(137, cancelled=True), False, "cancelled", 143, "scancel"),
        (Ending(2), False, "bad input", 2, "fail again"),
        (Ending(1), True, FAILED, 1, "failed (status 1); once more, to go on after step 30"),
        (Ending(137), True, FAILED, 137, "killed by signal 9"),
        (Ending(70), True, FAILED, 70, "hung (status 70)"),
        (Ending(69), True, FAILED, 69, "lost"),
        (Ending(0), True, FAILED, 1, "without its mark DONE"),
    ],
)
def test_what_follows_from_an_ending(ending, requeued, ended, status, words):
    decision = decide(ending, starts(0, 10), 30, LIMITS)
    assert (decision.requeue, decision.ended, decision.status) == (requeued, ended, status)
    assert words in decision.why


@pytest.mark.parametrize("ending", [Ending(137), Ending(70), Ending(75, warned="time is over")])
def test_a_job_that_gets_nowhere_is_given_up(ending):
    assert decide(ending, starts(0, 20, 20), 20, LIMITS).requeue
    decision = decide(ending, starts(0, 20, 20, 20), 20, LIMITS)
    assert not decision.requeue
    assert "given up: the last 3 starts began at step 20 and left no newer checkpoint" in decision.why
    assert decide(ending, starts(0, 20, 20, 20), 25, LIMITS).requeue, "the third try got further"


def test_failures_are_counted_and_times_over_are_not():
    assert decide(Ending(1), starts(0, 1, 2, 3), 4, LIMITS).requeue
    assert "5 starts have failed (MM_MAX_RESTARTS=4)" in decide(Ending(1), starts(0, 1, 2, 3, 4), 5, LIMITS).why
    assert decide(Ending(1), starts(*range(100), ended="time"), 200, LIMITS).requeue


def test_a_start_of_which_nobody_could_tell_the_end_counts_as_failed():
    """The batch script's own node was lost; SLURM requeued the job by itself."""
    assert refusal(starts(0, 1, 2, 3, ended=None), 4, LIMITS) is None
    assert "5 starts have failed" in refusal(starts(0, 1, 2, 3, 4, ended=None), 5, LIMITS)
    assert "began at step 4" in refusal(starts(4, 4, 4, ended=None), 4, LIMITS)


def test_bad_nodes_are_not_the_fault_of_the_run():
    found = starts(4, 4, 4, ended=BAD_NODES)
    assert refusal(found, 4, LIMITS) is None
    found[-1].ended = BAD_NODES
    assert refusal(found, 4, LIMITS) == "the last 3 starts found unfit nodes (MM_MAX_NO_PROGRESS=3)"


def test_the_newest_step_is_that_of_a_complete_checkpoint(tmp_path):
    assert newest_step(tmp_path) == 0
    for name in ("step-00000004", "step-00000012", "step-00000016.partial", "latest"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    assert newest_step(tmp_path) == 12


def test_the_record_has_a_line_a_start_and_a_new_job_begins_anew(tmp_path):
    (tmp_path / "slurm").mkdir()
    history = History(tmp_path, "7")
    history.begin(0, 0, ["a", "b"], 2)
    assert History(tmp_path, "7").starts[0].ended is None
    history.begin(1, 4, ["a", "c"], 2)
    history.end(0, FAILED, 137, 4)  # told late
    history.file.write_text(history.file.read_text() + "half a li")
    again = History(tmp_path, "7")
    assert [(s.restart, s.step, s.nodes, s.ended, s.status) for s in again.starts] == [
        (0, 0, ["a", "b"], FAILED, 137),
        (1, 4, ["a", "c"], None, None),
    ]
    assert History(tmp_path, "8").starts == []
    new = History(tmp_path, "8")
    new.begin(0, 4, ["a"], 1)
    assert [json.loads(line)["job"] for line in new.file.read_text().splitlines()] == ["7", "7", "8"]
