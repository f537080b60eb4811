"""The command itself: learning, resuming after a kill, stages in a chain, bad input."""

import dataclasses
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch

from mm_train import checkpoint, config, export, generate, validate
from mm_train.cli import UserError
from mm_train.inventory import active_parameters
from mm_train.metrics import read_metrics
from mm_train.model_folder import load_model
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
    assert checkpoint.latest(run).name == "step-00000012"
    assert (run / "tokenizer.json").exists()


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
    bias = checkpoint.Reader(checkpoint.latest(Path(finished.run.dir))).read("model.layers.0.feed_forward.expert_bias")
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
    saved = checkpoint.read_manifest(checkpoint.latest(tmp_path / "killed"))["step"]
    assert 4 <= saved < 12  # how far it came before the signal depends on the machine
    output = start(python, tmp_path / "cfg.yaml").communicate()[0]
    assert f"resuming after step {saved} " in output
    assert losses(tmp_path / "killed") == want
    final = [
        checkpoint.Reader(checkpoint.latest(Path(d))).weights() for d in (small_config.run.dir, tmp_path / "killed")
    ]
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


def test_a_divergence_stops_before_it_is_saved(small_config, monkeypatch):
    from mm_train.engine import PlainEngine

    step = PlainEngine.step
    calls = []

    def explode(engine, rate):
        calls.append(rate)
        return step(engine, rate) if len(calls) < 6 else torch.tensor(float("nan"))

    monkeypatch.setattr(PlainEngine, "step", explode)
    with pytest.raises(UserError, match=r"gradient norm of step 6 is nan; the last checkpoint is .*step-00000004"):
        train(small_config)


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
