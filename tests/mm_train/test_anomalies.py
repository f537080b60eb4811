"""Skipped steps, spikes and rollbacks, decided alike before and after a restart."""

import json
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_train.anomalies import ENOUGH, LEVEL, WINDOW, Anomalies, Verdict, diverged
from mm_train.cli import UserError
from mm_train.config import Faults, Optim

NAN, INF = math.nan, math.inf


def spiky(**values) -> Anomalies:
    return Anomalies(Faults(**{"spike_factor": 6.0} | values))


def calm(anomalies: Anomalies, steps: int = 40, level: float = 3.0, seed: int = 0) -> Anomalies:
    """After `steps` ordinary losses around `level`."""
    noise = random.Random(seed)
    for _ in range(steps):
        assert anomalies.judge(level + noise.gauss(0, 0.02), 1.0).action == "ok"
    return anomalies


@pytest.mark.parametrize(
    ("loss", "norm", "reason"),
    [
        (NAN, 1.0, "the loss is nan"),
        (INF, 1.0, "the loss is inf"),
        (2.0, NAN, "the gradient norm is nan"),
        (2.0, INF, "the gradient norm is inf"),
        (NAN, NAN, "the loss is nan and the gradient norm is nan"),
    ],
)
def test_what_is_not_finite_is_skipped(loss, norm, reason):
    verdict = Anomalies(Faults()).judge(loss, norm)
    assert verdict == Verdict("skip", f"{reason}; skipped, 1 in a row of at most 10")


def test_a_run_of_skipped_steps_ends_the_training():
    anomalies = Anomalies(Faults(max_skipped_steps=3))
    assert [anomalies.judge(NAN, 1.0).action for _ in range(3)] == ["skip"] * 3
    assert anomalies.judge(2.0, 0.0).action == "ok"  # a gradient of zero is one
    assert [anomalies.judge(2.0, INF).action for _ in range(3)] == ["skip"] * 3
    verdict = anomalies.judge(NAN, 1.0)
    assert verdict.action == "stop"
    assert anomalies.skipped_steps == 6
    error = diverged(41, verdict, "runs/x/checkpoints/step-00000030", Optim(lr=0.5, warmup_steps=7))
    assert isinstance(error, UserError)
    assert str(error) == (
        "training diverged: in step 41 the loss is nan, as in the 3 steps before it, which were skipped"
        " (faults.max_skipped_steps); the last checkpoint is runs/x/checkpoints/step-00000030; try a lower optim.lr"
        " (now 0.5) or more optim.warmup_steps (now 7)"
    )
    assert "there is no checkpoint yet" in str(diverged(1, verdict, None, Optim()))


def test_nothing_is_skipped_when_the_config_says_so():
    verdict = Anomalies(Faults(max_skipped_steps=0)).judge(NAN, 1.0)
    assert verdict == Verdict("stop", "the loss is nan")


def test_a_spike_is_told_and_does_not_hide_the_next():
    anomalies = calm(spiky())
    before = list(anomalies.losses)
    verdict = anomalies.judge(3.5, 1.0)
    assert verdict.action == "warn"
    assert verdict.reason.startswith("the loss is 3.5, ")
    assert "above the median 2.996" in verdict.reason
    assert anomalies.losses == before
    assert anomalies.judge(3.5, 1.0).action == "warn"
    assert anomalies.judge(3.02, 1.0).action == "ok"
    assert anomalies.judge(1.0, 1.0).action == "ok"  # a fall is none


def test_spikes_are_looked_for_only_when_asked_and_known_well_enough():
    off = calm(Anomalies(Faults()))
    assert off.judge(1e6, 1.0).action == "ok"
    early = calm(spiky(), steps=ENOUGH - 1)
    assert early.judge(1e6, 1.0).action == "ok"
    assert calm(spiky(), steps=ENOUGH).judge(1e6, 1.0).action == "warn"


def test_a_falling_loss_and_a_flat_one_have_no_spikes():
    falling = spiky()
    noise = random.Random(0)
    for step in range(300):
        assert falling.judge(2 + 6 * math.exp(-step / 40) + noise.gauss(0, 0.05), 1.0).action == "ok"
    flat = spiky()
    for _ in range(30):
        assert flat.judge(2.0, 1.0).action == "ok"
    assert flat.judge(2.0000001, 1.0).action == "ok"
    assert flat.judge(2.1, 1.0).action == "warn"


def test_the_noise_of_a_run_is_rarely_called_a_spike():
    anomalies = spiky()
    noise = random.Random(1)
    assert sum(anomalies.judge(noise.gauss(3, 0.1), 1.0).action != "ok" for _ in range(20_000)) <= 2


def test_a_new_level_is_learnt():
    anomalies = calm(spiky())
    actions = [anomalies.judge(5.0 + 0.01 * i, 1.0) for i in range(LEVEL)]
    assert [verdict.action for verdict in actions] == ["warn"] * LEVEL
    assert actions[-1].reason.endswith(f"; {LEVEL} steps in a row: taken as the new level")
    calm(anomalies, level=5.0)
    assert anomalies.judge(9.0, 1.0).action == "warn"


def test_what_a_spike_does_is_the_configs_choice():
    assert calm(spiky(spike_action="stop")).judge(9.0, 1.0).action == "stop"
    anomalies = calm(spiky(spike_action="rollback", max_rollbacks=2))
    saved = json.loads(json.dumps(anomalies.state()))
    for count in (1, 2):
        calm(anomalies, steps=5)
        assert anomalies.judge(NAN, 1.0).action == "skip"
        assert anomalies.judge(9.0, 1.0).action == "rollback"
        anomalies.roll_back(saved)
        assert (anomalies.rollbacks, anomalies.losses) == (count, saved["losses"])
    assert anomalies.skipped_steps == 2  # they were skipped, whatever became of the steps around them
    verdict = anomalies.judge(9.0, 1.0)
    assert verdict.action == "stop"
    assert verdict.reason.endswith(", after 2 rollbacks (faults.max_rollbacks)")


LOSSES = st.lists(
    st.one_of(st.floats(1, 4), st.floats(2.9, 3.1), st.floats(2.9, 3.1), st.sampled_from([NAN, INF, 9.0])), max_size=120
)


@given(losses=LOSSES, cut=st.integers(0, 120), action=st.sampled_from(["warn", "stop"]))
def test_a_resumed_run_decides_as_the_uninterrupted_one(losses, cut, action):
    whole, first, second = (spiky(spike_factor=3.0, spike_action=action) for _ in range(3))
    want = [whole.judge(loss, 1.0) for loss in losses]
    got = [first.judge(loss, 1.0) for loss in losses[:cut]]
    second.load(json.loads(json.dumps(first.state())))
    got += [second.judge(loss, 1.0) for loss in losses[cut:]]
    assert got == want
    assert second.state() == whole.state()
    assert len(whole.losses) <= WINDOW


def test_a_checkpoint_of_before_there_were_anomalies_can_be_continued():
    anomalies = calm(spiky())
    anomalies.load({})
    assert anomalies.state() == Anomalies(Faults()).state()
