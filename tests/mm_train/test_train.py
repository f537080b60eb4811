"""The command itself: learning, resuming after a kill, stages in a chain, bad input."""

import dataclasses
import gzip
import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mm_train import config, generate, validate
from mm_train.anomalies import Anomalies
from mm_train.checkpoint.folders import latest
from mm_train.checkpoint.reader import Reader
from mm_train.cli import UserError
from mm_train.engine import PlainEngine
from mm_train.export import __main__ as export
from mm_train.inventory import active_parameters
from mm_train.metric_names import NAMES
from mm_train.metrics import read_metrics
from mm_train.model_folder import load_model
from mm_train.stopping import STOPPED, StopRequest
from mm_train.train import main, train
from tests.mm_train.test_model import VARIANTS

ROOT = Path(__file__).parents[2]


def losses(run_dir) -> dict[int, float]:
    return {record["step"]: record["loss"] for record in read_metrics(run_dir)["train"]}


def start(python, cfg_file) -> subprocess.Popen:
    command = [python, "-m", "mm_train.train", str(cfg_file)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture
def finished(small_config):
    train(small_config)
    return small_config


def test_a_run_learns_and_leaves_everything_behind(finished):
    run = Path(finished.run.dir)
    trace = losses(run)
    assert list(trace) == list(range(1, 13))
    assert trace[12] < trace[1] - 0.3
    records = read_metrics(run)
    held_out = {(r["step"], r["source"]): r for r in records["validation"]}
    assert held_out[12, "code"]["bits_per_byte"] < held_out[0, "code"]["bits_per_byte"]
    assert config.load([run / "config.yaml"]) == finished
    assert (run / "DONE").exists()
    assert latest(run).name == "step-00000012"
    assert (run / "tokenizer.json").exists()
    beat = json.loads((run / "heartbeat/rank-00000.json").read_text())
    assert beat["phase"] == "left"  # it was watched to the end
    assert beat["step"] >= 12
    for record in records["train"]:  # the dashboard shows nothing that training does not log
        assert set(NAMES["train"]) <= set(record)
        assert record["step_seconds"] == pytest.approx(sum(record["phase_seconds"].values()), rel=0.01)
        assert min(record["phase_seconds"][phase] for phase in ("data", "forward", "backward", "optimizer")) > 0


@pytest.mark.parametrize("variant", [name for name in VARIANTS if name != "mobilemoe"])
def test_the_networks_it_is_compared_with_train_too(small_config, variant, tmp_path):
    small_config.model = dataclasses.replace(small_config.model, **VARIANTS[variant])
    config.validate(small_config)
    train(small_config)
    run = Path(small_config.run.dir)
    trace = losses(run)
    assert trace[12] < trace[1] - 0.3
    assert export.main(["--checkpoint", str(run), "--out", str(tmp_path / "out"), "--format", "bf16"]) == 0
    tokens = torch.arange(20)[None]
    torch.testing.assert_close(load_model(tmp_path / "out")(tokens), load_model(run)(tokens), rtol=0.05, atol=0.05)


def test_the_reported_load_sums_to_one_and_the_bias_has_moved(finished):
    for record in read_metrics(finished.run.dir)["train"]:
        for layer in record["expert_load"]:
            assert sum(layer) == pytest.approx(1, abs=1e-3)
    bias = Reader(latest(Path(finished.run.dir))).read("model.layers.0.feed_forward.expert_bias")
    assert 0 < bias.abs().max() <= 12 * finished.moe.bias_update_rate * 1.001


def test_a_finished_run_is_not_repeated(finished, capsys, tmp_path):
    config.save(finished, tmp_path / "again.yaml")
    before = (Path(finished.run.dir) / "metrics.jsonl").read_bytes()
    assert main([str(tmp_path / "again.yaml")]) == 0
    assert "already finished" in capsys.readouterr().out
    assert (Path(finished.run.dir) / "metrics.jsonl").read_bytes() == before


def test_killed_and_resumed_equals_uninterrupted(small_config, tmp_path, python):
    train(small_config)
    want = losses(small_config.run.dir)
    interrupted = dataclasses.replace(
        small_config, run=config.Run(dir=str(tmp_path / "killed")), checkpoint=config.Checkpoint(every=2)
    )
    config.save(interrupted, tmp_path / "cfg.yaml")
    process = start(python, tmp_path / "cfg.yaml")
    for line in process.stdout:
        if "step  5/12" in line:
            process.send_signal(signal.SIGKILL)
            break
    assert process.wait() == -signal.SIGKILL
    saved = Reader(latest(tmp_path / "killed")).step
    assert 4 <= saved < 12  # how far it came before the signal depends on the machine
    output = start(python, tmp_path / "cfg.yaml").communicate()[0]
    assert f"resuming after step {saved} " in output
    assert losses(tmp_path / "killed") == want
    final = [Reader(latest(Path(d))).weights() for d in (small_config.run.dir, tmp_path / "killed")]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])


def test_stages_chain_through_init_from_to_a_release_that_keeps_the_loss(finished, tmp_path, capsys):
    chat = dataclasses.replace(
        finished,
        init_from=finished.run.dir,
        data=dataclasses.replace(finished.data, mixture={"chat": 1}),
        quant=config.Quant(enabled=True),
        run=config.Run(dir=str(tmp_path / "qat"), stage="qat"),
    )
    barely = dataclasses.replace(
        chat,
        train=dataclasses.replace(chat.train, tokens=512),
        optim=config.Optim(lr=1e-9, warmup_steps=0),
        run=config.Run(dir=str(tmp_path / "barely")),
    )
    train(barely)
    start = {r["source"]: r["loss"] for r in read_metrics(tmp_path / "barely")["validation"]}
    before = {r["source"]: r["loss"] for r in read_metrics(finished.run.dir)["validation"] if r["step"] == 12}
    assert start["code"] == pytest.approx(before["code"], rel=0.02)  # the same weights, seen through fake quantisation
    train(chat)

    assert export.main(["--checkpoint", str(tmp_path / "qat"), "--out", str(tmp_path / "int4")]) == 0
    assert "int4 release" in capsys.readouterr().out
    scores = []
    for model in ("qat", "int4"):
        arguments = ["--data", finished.data.path, "--sources", "code,chat", "--seq-len", "64"]
        assert validate.main(["--model", str(tmp_path / model), *arguments, "--out", str(tmp_path / "v.json")]) == 0
        scores.append(json.loads((tmp_path / "v.json").read_text()))
    last = {r["source"]: r["loss"] for r in read_metrics(tmp_path / "qat")["validation"] if r["step"] == 12}
    for source in ("code", "chat"):
        assert scores[0][source]["loss"] == pytest.approx(last[source], rel=1e-5)
        assert scores[1][source]["loss"] == pytest.approx(scores[0][source]["loss"], rel=0.01)

    capsys.readouterr()
    assert generate.main(["--model", str(tmp_path / "int4"), "--prompt", "import", "--max-new-tokens", "5"]) == 0
    assert "--- import" in capsys.readouterr().out


@pytest.fixture
def poison(monkeypatch):
    """A function: the gradients of these optimizer steps (as they come, from 1) get a value that is not finite."""
    backward, calls = PlainEngine.backward, []

    def spread(steps, micro_steps=4):
        calls.clear()

        def poisoned(engine, loss):
            backward(engine, loss)
            calls.append(loss)
            if len(calls) % micro_steps == 0 and len(calls) // micro_steps in steps:
                engine.model.model.norm.weight.grad[0] = torch.nan

        monkeypatch.setattr(PlainEngine, "backward", poisoned)

    return spread


def test_a_step_that_is_not_finite_is_skipped_and_told(small_config, poison):
    poison([5, 6, 9])
    assert train(small_config) == 0
    run = Path(small_config.run.dir)
    records = read_metrics(run)
    assert [r["step"] for r in records["skipped"]] == [5, 6, 9]
    assert records["skipped"][-1]["skipped_steps"] == 3
    assert "gradient norm nan" in records["skipped"][0]["reason"]
    assert losses(run)[12] < losses(run)[1] - 0.3
    assert all(tensor.isfinite().all() for tensor in Reader(latest(run)).weights().values())


def test_too_many_of_them_in_a_row_end_the_run(small_config, poison):
    small_config.faults.max_skipped_steps = 2
    poison([6, 7, 8])
    with pytest.raises(UserError, match=r"diverged: in step 8 the gradient norm is nan.*checkpoint is .*step-00000004"):
        train(small_config)


def test_a_run_resumed_after_skipped_steps_is_still_exact(small_config, poison):
    """AdamW has seen fewer steps than there were."""
    poison([3, 5])
    train(small_config)
    run = Path(small_config.run.dir)
    want, weights = losses(run), Reader(latest(run)).weights()
    assert Reader(latest(run)).manifest["updates"] == 10
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints/step-00000012")
    poison([])
    assert train(small_config) == 0
    assert losses(run) == want
    again = Reader(latest(run)).weights()
    assert all(torch.equal(again[name], weights[name]) for name in weights)


def test_good_checkpoints_outlive_a_row_of_skipped_steps(small_config, poison):
    small_config.checkpoint.every, small_config.checkpoint.keep = 2, 1
    small_config.faults.max_skipped_steps = 4
    poison([5, 6, 7, 8, 9])
    with pytest.raises(UserError, match=r"in step 9 .*the last checkpoint is .*step-00000004"):
        train(small_config)


def test_a_resumed_run_remembers_what_was_skipped(small_config, poison, monkeypatch):
    """Stopped in the middle of a row of bad steps, it goes on counting."""
    small_config.faults.max_skipped_steps = 2
    poison([6, 7])
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "wanted", lambda _: "a test" if next(asked) >= 7 else None)
        assert train(small_config) == STOPPED
    poison([1])  # step 8, of the process that resumes
    with pytest.raises(UserError, match="in step 8"):
        train(small_config)


@pytest.fixture
def spiking(small_config, monkeypatch):
    """40 steps, of which step 24 has a loss of more than ten, once."""
    small_config.train.tokens = 40 * 512
    small_config.checkpoint.every = 5
    small_config.faults = config.Faults(spike_factor=6.0)
    judge, seen = Anomalies.judge, []

    def judged(anomalies, loss, grad_norm):
        seen.append(loss)
        return judge(anomalies, loss + 10 * (len(seen) == 24), grad_norm)

    monkeypatch.setattr(Anomalies, "judge", judged)
    return small_config


def test_a_spike_is_told_and_trained_on_unless_asked_otherwise(spiking):
    assert train(spiking) == 0
    alerts = [r for r in read_metrics(spiking.run.dir)["alert"] if r["title"] == "loss spike" and r["step"] == 24]
    assert alerts
    assert len(losses(spiking.run.dir)) == 40


def test_a_rollback_goes_back_to_the_checkpoint_and_leaves_the_data_out(spiking):
    spiking.faults.spike_action = "rollback"
    assert train(spiking) == 0
    run = Path(spiking.run.dir)
    (rollback,) = read_metrics(run)["rollback"]
    assert (rollback["step"], rollback["to_step"], rollback["rollbacks"]) == (24, 20, 1)
    manifest = Reader(latest(run)).manifest
    assert manifest["samples"] == (40 + 4) * 8  # 8 rows a step; steps 21 to 24 were passed over
    assert list(losses(run)) == list(range(1, 41))

    # Gone on with from step 35, it reads the same data again.
    want = losses(run)
    (run / "DONE").unlink()
    shutil.rmtree(run / "checkpoints/step-00000040")
    assert train(spiking) == 0
    assert losses(run) == want


def test_a_rollback_before_any_checkpoint_is_a_skipped_step(spiking, capsys):
    spiking.faults.spike_action = "rollback"
    spiking.checkpoint.every = 100
    assert train(spiking) == 0
    assert "no checkpoint to go back to" in capsys.readouterr().out
    assert read_metrics(spiking.run.dir)["train"][-1]["skipped_steps"] == 1


def test_a_run_that_is_asked_to_stop_saves_and_continues_exactly(small_config, tmp_path, python):
    train(small_config)
    want = losses(small_config.run.dir)
    stopped = dataclasses.replace(small_config, run=config.Run(dir=str(tmp_path / "stopped")))
    stopped.checkpoint.every = 100
    config.save(stopped, tmp_path / "cfg.yaml")
    for number in (signal.SIGTERM, signal.SIGUSR1):
        process = start(python, tmp_path / "cfg.yaml")
        for line in process.stdout:
            if "tok/s" in line:
                process.send_signal(number)
                break
        rest = process.stdout.read()
        assert process.wait() == STOPPED, rest
        assert f"stopped after step {Reader(latest(tmp_path / 'stopped')).step}: {number.name}" in rest
    (tmp_path / "stopped/STOP").touch()
    assert train(stopped) == STOPPED
    assert not (tmp_path / "stopped/STOP").exists()
    assert train(stopped) == 0
    assert losses(tmp_path / "stopped") == want


def test_a_damaged_checkpoint_is_told_and_the_one_before_it_taken(finished):
    run = Path(finished.run.dir)
    want = losses(run)
    (run / "DONE").unlink()
    file = run / "checkpoints/step-00000012/rank-00000.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert train(finished) == 0
    (alert,) = [r for r in read_metrics(run)["alert"] if r["title"] == "damaged checkpoint"]
    assert "rank-00000.safetensors" in alert["text"]
    assert "step-00000008" in alert["text"]
    assert losses(run) == want
    assert latest(run).name == "step-00000012"


def test_a_disk_that_is_full_at_the_end_is_one_line_and_loses_no_checkpoint(
    small_config, monkeypatch, tmp_path, capsys
):
    def full(path, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("mm_train.files.write_atomic", full)
    config_save = tmp_path / "cfg.yaml"
    config.save(small_config, config_save)
    assert main([str(config_save)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: cannot write the run folder")
    assert latest(Path(small_config.run.dir)).name == "step-00000012"


def test_chosen_steps_are_profiled(small_config):
    small_config.profile.steps = "3-4"
    train(small_config)
    folder = Path(small_config.run.dir) / "profile"
    assert "profile of 2 step(s)" in (folder / "top.txt").read_text()
    trace = json.loads(gzip.decompress((folder / "rank-00000.trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("training step") >= 2
    assert any("scaled_dot_product" in str(name) for name in names)


def test_a_shorter_budget_than_was_trained_is_refused(finished):
    (Path(finished.run.dir) / "DONE").unlink()
    finished.train.tokens = 5 * 512
    with pytest.raises(UserError, match="12 steps done, 5 wanted"):
        train(finished)


def test_accumulation_does_not_change_the_result(small_config, tmp_path):
    """Dropless: micro-batches of 2 and of 4 rows add up to the same steps."""
    train(small_config)
    larger = dataclasses.replace(
        small_config,
        train=dataclasses.replace(small_config.train, micro_batch_size=4),
        run=config.Run(dir=str(tmp_path / "larger")),
    )
    train(larger)
    for step, loss in losses(small_config.run.dir).items():
        assert losses(tmp_path / "larger")[step] == pytest.approx(loss, abs=2e-5)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim.lrr=1"], "unknown key optim.lrr (did you mean optim.lr?)"),
        (["model.num_local_experts=6", "parallel.expert_parallel=4"], "expert_parallel (4) must divide"),
        (["optim.lr=-1"], "optim.lr is -1.0; it must be above 0"),
        (["data.seq_len=512", "train.global_batch_tokens=4096"], "must not exceed model.max_position_embeddings (256)"),
        (["data.path=nowhere"], "data set folder not found: nowhere"),
        (["data.mixture.books=1"], "no train split of source 'books'"),
        (["init_from=nowhere"], "model folder not found: nowhere"),
        (["run.dir=/proc/nothing/here"], "/proc/nothing/here"),
    ],
)
def test_bad_input_is_one_line_and_status_2(small_config, tmp_path, capsys, overrides, message):
    config.save(small_config, tmp_path / "cfg.yaml")
    assert main([str(tmp_path / "cfg.yaml"), *overrides]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")


def test_a_checkpoint_of_another_model_is_refused_and_kept(finished, tmp_path, capsys):
    (Path(finished.run.dir) / "DONE").unlink()
    config.save(finished, tmp_path / "cfg.yaml")
    before = sorted(p.name for p in Path(finished.run.dir).rglob("*"))
    assert main([str(tmp_path / "cfg.yaml"), "model.intermediate_size=64"]) == 2
    assert "another model: model.intermediate_size is 32 there and 64 here" in capsys.readouterr().err
    assert main([str(tmp_path / "cfg.yaml"), "run.dir=" + str(tmp_path / "new"), "init_from=" + finished.run.dir,
                 "model.intermediate_size=64"]) == 2  # fmt: skip
    assert "another model: model.intermediate_size is 32 there and 64 here" in capsys.readouterr().err
    assert sorted(p.name for p in Path(finished.run.dir).rglob("*")) == before


@pytest.mark.parametrize(("size", "active"), [("s", 272_469_936), ("m", 528_300_568), ("l", 921_685_120)])
def test_active_parameters_are_the_published_ones(size, active):
    cfg = config.load([ROOT / f"configs/model/{size}.yaml", ROOT / "configs/stage/pretrain.yaml"], ["run.dir=x"])
    assert sum(active_parameters(cfg.model).values()) == active


def test_a_changed_mixture_is_refused_unless_it_is_told_to_go_on(small_config, capsys):
    first = dataclasses.replace(small_config, train=dataclasses.replace(small_config.train, tokens=6 * 512))
    first.checkpoint.every = 6
    train(first)
    run = Path(small_config.run.dir)
    (run / "DONE").unlink()
    changed = dataclasses.replace(small_config, data=dataclasses.replace(small_config.data, mixture={"code": 1}))
    with pytest.raises(UserError, match=r"its source chat is missing here; .*, or data\.on_change=continue to go on"):
        train(changed)
    going_on = dataclasses.replace(changed, data=dataclasses.replace(changed.data, on_change="continue"))
    assert train(going_on) == 0
    (alert,) = (r for r in read_metrics(run)["alert"] if r["title"] == "data mixture changed")
    assert alert["text"] == "the mixture changes at sample 48: chat 250 -> 0 in 1000; code 750 -> 1000 in 1000"
    data = Reader(latest(run)).manifest["data"]
    assert (data["since"]["sample"], data["since"]["before"]["chat"]["samples_in_1000"]) == (48, 250)
    capsys.readouterr()
    (run / "DONE").unlink()
    longer = dataclasses.replace(changed.train, tokens=13 * 512)
    assert train(dataclasses.replace(changed, train=longer)) == 0  # once taken over, it is the run's mixture
    assert "data code: 100.0% of the rows" in capsys.readouterr().out


def test_a_source_that_is_repeated_too_often_is_warned_about(small_config):
    small_config.data = dataclasses.replace(small_config.data, max_epochs=0.01)
    train(small_config)
    (alert,) = (r for r in read_metrics(Path(small_config.run.dir))["alert"] if r["title"] == "data repeated")
    assert alert["text"].startswith("this stage reads chat 0.")
