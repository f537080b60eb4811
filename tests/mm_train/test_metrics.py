import json
import math
import struct
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from mm_train.cli import UserError
from mm_train.metric_names import GROUPS, PHASES
from mm_train.metrics import Metrics, read_metrics, wandb_entity


def make_metrics(folder, *, is_main=True, wandb_mode="disabled") -> Metrics:
    return Metrics(folder, is_main=is_main, wandb_mode=wandb_mode, config={"lr": 1}, project="test", run_name="test")


def test_a_record_comes_back_as_written(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.run(stage="pretrain", total_steps=20)
    metrics.train(10, loss=np.float32(2.5), expert_load=np.array([[0.5, 0.5], [0.123456789, 0.876543211]]))
    metrics.validation(10, "code", loss=2.0, bits_per_byte=1.5)
    metrics.validation(10, "docs", loss=3.0, bits_per_byte=1.7)
    metrics.checkpoint(10, seconds=0.5, bytes=7)
    metrics.done(20, seconds=9.0)
    metrics.close()
    records = read_metrics(tmp_path)
    assert records["run"][0]["stage"] == "pretrain"
    assert records["train"] == [
        {"kind": "train", "step": 10, "loss": 2.5, "expert_load": [[0.5, 0.5], [0.12346, 0.87654]]}
    ]
    assert [r["source"] for r in records["validation"]] == ["code", "docs"]
    assert records["checkpoint"] == [{"kind": "checkpoint", "step": 10, "seconds": 0.5, "bytes": 7}]
    assert records["done"] == [{"kind": "done", "step": 20, "seconds": 9.0}]


def test_what_is_not_finite_becomes_null(tmp_path):
    metrics = make_metrics(tmp_path)
    metrics.train(1, loss=math.nan, grad_norm=math.inf, expert_load=[[math.nan, 1.0]])
    metrics.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=pytest.fail)  # NaN and Infinity are not JSON
    assert (record["loss"], record["grad_norm"], record["expert_load"]) == (None, None, [[None, 1.0]])


def test_a_resumed_run_replaces_the_steps_it_repeats(tmp_path):
    first = make_metrics(tmp_path)
    for step in (10, 20, 30):
        first.train(step, loss=float(step))
    first.validation(30, "code", loss=9.0)
    first.close()
    with open(tmp_path / "metrics.jsonl", "a") as stream:
        stream.write('{"kind": "train", "step": 40, "lo')  # killed in the middle of a line
    assert [r["step"] for r in read_metrics(tmp_path)["train"]] == [10, 20, 30]

    second = make_metrics(tmp_path)
    for step in (20, 30, 40):
        second.train(step, loss=float(step + 1))
    second.validation(30, "code", loss=8.0)
    second.close()
    records = read_metrics(tmp_path)
    assert [(r["step"], r["loss"]) for r in records["train"]] == [(10, 10), (20, 21), (30, 31), (40, 41)]
    assert [r["loss"] for r in records["validation"]] == [8.0]


def test_a_damaged_file_is_named_with_its_line(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nrubbish\n{"kind": "train", "step": 2}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2: not a metrics record: 'rubbish'"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="is not a run folder"):
        read_metrics(tmp_path / "nowhere")


def test_other_ranks_write_nothing(tmp_path, capsys):
    metrics = make_metrics(tmp_path / "run", is_main=False)
    metrics.run(stage="sft")
    metrics.train(1, loss=1.0)
    metrics.validation(1, "code", loss=1.0)
    metrics.checkpoint(1, seconds=1.0)
    metrics.done(1)
    metrics.say("hello")
    metrics.close()
    assert not (tmp_path / "run").exists()
    assert capsys.readouterr().out == ""


def test_the_log_has_one_readable_line_per_record(tmp_path, capsys):
    metrics = make_metrics(tmp_path)
    metrics.run(stage="sft", model="tiny", total_steps=800, global_batch_tokens=8192)
    metrics.train(
        120,
        tokens=983_040,
        loss=3.2141,
        lr=9.1e-4,
        grad_norm=0.83,
        dropped_fraction=0.004,
        tokens_per_second=6200.0,
        mfu=None,
        expert_load=[[0.25, 0.25, 0.25, 0.25], [0.3275, 0.2, 0.2, 0.2725]],
    )
    metrics.close()
    expected = (
        "step 120/800  tok  983k  loss 3.214  lr 9.1e-04  |g| 0.83  drop 0.4%  load 1.31x   6.2k tok/s  eta 14:58"
    )
    assert expected in capsys.readouterr().out.splitlines()
    assert (tmp_path / "train.log").read_text().splitlines()[-1].endswith(expected)


def test_an_unwritable_run_folder_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write the run folder .*file/run: Not a directory"):
        make_metrics(tmp_path / "file" / "run")


def test_an_unknown_wandb_mode_is_one_clear_error(tmp_path):
    with pytest.raises(UserError, match='unknown W&B mode "onlien": it is one of auto, online'):
        make_metrics(tmp_path, wandb_mode="onlien")


def test_a_full_disk_is_said_once_and_training_goes_on(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    metrics = make_metrics(tmp_path)
    metrics.train(1, loss=2.0)
    metrics.train(2, loss=1.0)
    metrics.close()
    captured = capsys.readouterr()
    assert captured.err.count("metrics.jsonl fails, training goes on") == 1
    assert "No space left on device" in captured.err
    assert "step 2  loss 1.000" in captured.out


def test_auto_without_wandb_keeps_the_jsonl_and_says_so(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # an import of it now fails
    metrics = make_metrics(tmp_path, wandb_mode="auto")
    metrics.train(1, loss=2.0)
    metrics.close()
    assert capsys.readouterr().out.count("wandb is not installed") == 1
    assert read_metrics(tmp_path)["train"][0]["loss"] == 2.0
    with pytest.raises(UserError, match=r'W&B mode "offline" needs the wandb package'):
        make_metrics(tmp_path, wandb_mode="offline")


def test_wandb_offline_continues_the_same_run_and_cannot_stop_training(tmp_path, capsys, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))  # nobody is logged in here
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    for step in (1, 2):
        metrics = make_metrics(tmp_path / "run", wandb_mode="auto")
        metrics.train(step, loss=1.0)
        if step == 2:
            metrics._wandb.finish()  # W&B dies under us
            metrics.train(3, loss=1.0)
        metrics.close()
    run_id = (tmp_path / "run" / "wandb" / "run_id").read_text().strip()
    assert run_id.startswith("run-")
    assert list((tmp_path / "run" / "wandb").glob(f"offline-run-*/run-{run_id}.wandb"))
    assert "W&B offline" in capsys.readouterr().out
    assert [r["step"] for r in read_metrics(tmp_path / "run")["train"]] == [1, 2, 3]


def test_events_are_said_and_come_back(tmp_path, capsys):
    metrics = make_metrics(tmp_path)
    metrics.run(stage="sft", total_steps=20)
    metrics.skipped(3, math.nan, math.inf, skipped_steps=1)
    metrics.skipped(4, 2.0, math.inf, skipped_steps=2)
    metrics.rollback(9, to_step=5, reason="the loss is a spike", rollbacks=1)
    metrics.rollback(9, to_step=5, reason="again", rollbacks=2)  # after going back, step 9 came a second time
    metrics.alert(10, "dead experts", "2 of them")
    metrics.alert(10, "throughput falls", "100 tokens/s", level="error")
    metrics.alert(10, "dead experts", "3 of them")  # step 10 was repeated
    metrics.stopped(12, "SIGTERM")
    metrics.close()
    records = read_metrics(tmp_path)
    assert [(r["step"], r["loss"], r["skipped_steps"]) for r in records["skipped"]] == [(3, None, 1), (4, 2.0, 2)]
    assert [r["reason"] for r in records["rollback"]] == ["the loss is a spike", "again"]
    assert [(r["title"], r["text"], r["level"]) for r in records["alert"]] == [
        ("dead experts", "3 of them", "warn"),
        ("throughput falls", "100 tokens/s", "error"),
    ]
    assert records["stopped"] == [{"kind": "stopped", "step": 12, "reason": "SIGTERM"}]
    said = capsys.readouterr().out.splitlines()
    assert said[1:5] == [
        "step  3/20  skipped: loss nan, gradient norm inf (1 so far)",
        "step  4/20  skipped: loss 2.000, gradient norm inf (2 so far)",
        "step  9/20  back to step 5: the loss is a spike (1 so far)",
        "step  9/20  back to step 5: again (2 so far)",
    ]
    assert "step 10/20  ALERT throughput falls: 100 tokens/s" in said
    assert said[-1] == "stopped after step 12: SIGTERM; the same command goes on from here"


def test_an_unknown_level_of_an_alert_is_refused(tmp_path):
    with pytest.raises(AssertionError, match="unknown level loud"):
        make_metrics(tmp_path).alert(1, "x", "y", level="loud")


def a_run_of_everything(metrics: Metrics) -> None:
    """One record of each kind, with the values that training gives."""
    metrics.run(stage="pretrain", total_steps=20, global_batch_tokens=512)
    metrics.train(
        10,
        tokens=5120,
        loss=3.0,
        lr=1e-3,
        grad_norm=1.5,
        grad_norm_parts={"attention": 1.0, "router": 0.5},
        z_loss=9.0,
        router_entropy=[2.0, 1.0],
        router_entropy_share=0.7,
        dropped_fraction=0.1,
        expert_load=[[0.5, 0.5], [1.0, 0.0]],
        load_max=[1.0, 2.0],
        load_min=[1.0, 0.0],
        load_cv=[0.0, 1.0],
        dead_experts=1,
        tokens_per_second=100.0,
        tokens_per_second_per_gpu=50.0,
        model_flops_per_second=1e12,
        mfu=0.3,
        step_seconds=5.0,
        phase_seconds=dict.fromkeys(PHASES, 0.5) | {"other": 1.5},
        data_mixture={"code": 0.6, "docs": 0.4},
        memory_gib={"host": 1.0},
        seconds=60.0,
        skipped_steps=0,
        rollbacks=0,
    )
    metrics.validation(10, "code", loss=2.0, bits_per_byte=1.5)
    metrics.evaluation(10, scores={"piqa": 0.5}, average=0.5, bits_per_byte={"piqa": 2.0}, limit=100, seconds=9.0)
    metrics.checkpoint(10, seconds=2.0, stalled_seconds=0.1, bytes=1000)
    metrics.skipped(11, math.nan, math.nan, skipped_steps=1)
    metrics.rollback(12, to_step=10, reason="spike", rollbacks=1)
    metrics.alert(12, "dead experts", "1 expert got no token", level="error")
    metrics.done(20, seconds=100.0)


def read_wandb(path: Path) -> Iterator:
    """The records of a .wandb file: protobuf in the log format of LevelDB (blocks of 32 KiB, chunks of records)."""
    from wandb.proto import wandb_internal_pb2

    content, place, whole = path.read_bytes(), 7, b""  # after ":W&B", a magic number and a version
    while place + 7 <= len(content):
        if (left := 32768 - place % 32768) < 7:  # no room for a header: the block is padded
            place += left
            continue
        _, length, kind = struct.unpack_from("<IHB", content, place)  # kinds: 1 whole, 2 first, 3 middle, 4 last
        chunk = content[place + 7 : place + 7 + length]
        whole = chunk if kind in (1, 2) else whole + chunk
        place += 7 + length
        if kind in (1, 4):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record


def test_a_wandb_offline_folder_read_back_has_every_group(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    metrics = make_metrics(tmp_path / "run", wandb_mode="offline")
    a_run_of_everything(metrics)
    metrics.close()
    wandb.teardown()  # as the end of the process would: its writer has put everything on the disk then
    (path,) = (tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb")
    records = list(read_wandb(path))

    rows = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.WhichOneof("record_type") == "history"
    ]
    logged = {name: value for row in rows for name, value in row.items() if not name.startswith("_")}
    assert {name.split("/")[0] for name in logged} - {"step"} == set(GROUPS)
    assert {
        "train/loss": 3.0,
        "grad_norm/total": 1.5,
        "grad_norm/attention": 1.0,
        "router/entropy/layer_01": 1.0,
        "experts/load_max/layer_01": 2.0,
        "experts/dead": 1,
        "throughput/mfu": 0.3,
        "time/all_to_all": 0.5,
        "data/code": 0.6,
        "memory/host": 1.0,
        "validation/code/loss": 2.0,
        "evaluation/piqa": 0.5,
        "evaluation/average": 0.5,
        "checkpoint/stalled_seconds": 0.1,
        "faults/skipped_steps": 1,
        "faults/rollbacks": 1,
        "faults/alerts": 1,
    }.items() <= logged.items()
    assert [row["step"] for row in rows] == [10, 10, 10, 10, 11, 12, 12]
    (alert,) = [record.alert for record in records if record.WhichOneof("record_type") == "alert"]
    assert (alert.title, alert.text, alert.level) == ("dead experts", "step 12: 1 expert got no token", "ERROR")


def test_without_a_wandb_login_there_is_one_clear_line(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    with pytest.raises(UserError, match="nobody is logged in to W&B here: wandb login, or set WANDB_API_KEY"):
        wandb_entity()
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"this needs the wandb package"):
        wandb_entity()
