from pathlib import Path

import pytest

from mm_train.cli import UserError
from mm_train.metrics import Metrics
from mm_train.run_folder import Event, read_stage, read_stages


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    metrics = Metrics(tmp_path, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.run(stage="pretrain", global_batch_tokens=100)
    metrics.validation(0, "code", loss=9.0)
    metrics.train(1, tokens=100, loss=3.0, tokens_per_second=1.0, expert_load=[[0.9, 0.1]])
    metrics.train(2, tokens=200, loss=float("nan"), tokens_per_second=5.0, expert_load=[[0.75, 0.25], [0.0, 0.0]])
    metrics.train(3, tokens=300, loss=1.0, tokens_per_second=6.0)
    metrics.validation(3, "code", loss=2.0, bits_per_byte=1.5)
    metrics.close()
    return tmp_path


def test_a_stage_is_read_back(run_dir):
    (stage,) = read_stages(run_dir)
    assert (stage.name, stage.steps, stage.tokens, stage.tokens_per_second) == ("pretrain", 3, 300, 5.0)
    assert stage.series("loss") == ([100, 300], [3.0, 1.0])
    assert stage.held_out("code", "loss") == ([0, 300], [9.0, 2.0])
    assert stage.last_held_out("code", "bits_per_byte") == 1.5
    assert stage.last_held_out("docs", "loss") is None
    assert stage.expert_load == [[1.5, 0.5], [0.0, 0.0]]
    assert not stage.finished
    (run_dir / "DONE").touch()
    assert read_stage(run_dir).finished


def test_a_folder_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="nothing was trained there yet"):
        read_stages(tmp_path)


def test_every_number_is_a_series_by_name(run_dir):
    stage = read_stage(run_dir)
    assert stage.named["train/loss"] == ([100, 300], [3.0, 1.0])
    assert stage.named["experts/load_max/layer_00"] == ([100, 200], [1.8, 1.5])
    assert stage.named["validation/code/loss"] == ([0, 300], [9.0, 2.0])
    assert list(stage.matching(("experts/load_max/*", "train/loss"))) == [
        "experts/load_max/layer_00",
        "experts/load_max/layer_01",
        "train/loss",
    ]


def test_events_are_in_order_of_step(run_dir):
    assert read_stage(run_dir).events == []
    metrics = Metrics(run_dir, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
    metrics.alert(9, "loss jumps", "from 2 to 3")
    metrics.run(stage="pretrain", global_batch_tokens=100, first_step=3)
    metrics.skipped(5, float("nan"), 1.0, skipped_steps=1)
    metrics.rollback(8, to_step=4, reason="spike", rollbacks=1)
    metrics.checkpoint(8, seconds=2.0, stalled_seconds=0.5)
    metrics.stopped(10, "SIGTERM")
    metrics.close()
    stage = read_stage(run_dir)
    assert stage.events == [
        Event(3, "resumed", "a new process went on after step 3"),
        Event(5, "skipped", "loss nan, gradient norm 1.00"),
        Event(8, "rollback", "back to step 4: spike"),
        Event(9, "alert", "loss jumps: from 2 to 3"),
        Event(10, "stopped", "SIGTERM"),
    ]
    assert [record["stalled_seconds"] for record in stage.checkpoints] == [0.5]
