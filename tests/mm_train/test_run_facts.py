import json
from dataclasses import replace

import pytest

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.engine import PlainEngine
from mm_train.metrics import Metrics
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.run_facts import run_facts


@pytest.fixture
def runs(small_config, tmp_path):
    """Two stages: the second began with the weights of the first, which began with a folder that is gone."""
    for name, start in (("pretrain", tmp_path / "gone" / "seed"), ("qat", tmp_path / "pretrain")):
        folder = tmp_path / name
        log = Metrics(folder, is_main=True, wandb_mode="disabled", config={}, project="p", run_name="r")
        log.run(stage=name, global_batch_tokens=512)
        log.validation(4, "code", loss=2.0, bits_per_byte=2.5)
        log.validation(8, "code", loss=1.0, bits_per_byte=1.5)
        log.validation(8, "chat", loss=1.0)
        log.train(8, tokens=8 * 512, loss=1.0)
        log.close()
        cfg = replace(small_config, init_from=str(start), quant=config.Quant(enabled=name == "qat"))
        config.save(cfg, folder / "config.yaml")
    small_config.checkpoint.asynchronous = False
    writer = Writer(tmp_path / "pretrain", Groups(), small_config)
    writer.save(4, PlainEngine(MobileMoE(small_config.model), small_config.optim), {})
    return tmp_path


def test_what_the_runs_record_is_gathered(runs):
    data = {"code": {"weight": 0.75, "licence": "PSF-2.0"}, "chat": {"weight": 0.25, "licence": "PSF-2.0"}}
    common = {"seq_len": 64, "data": data}
    # The weights of the first stage are those of its checkpoint, not of its last step.
    first = {"stage": "pretrain", "steps": 4, "tokens": 2048, "bits_per_byte": {"code": 2.5}, "init_from": "seed"}
    second = {"stage": "qat", "steps": 8, "tokens": 4096, "bits_per_byte": {"code": 1.5}}
    stages = [first | common | {"quantisation_aware": False}, second | common | {"quantisation_aware": True}]
    facts = run_facts(runs / "qat")
    assert facts == {"stages": stages}
    assert json.loads(json.dumps(facts)) == facts
    assert run_facts(runs / "pretrain" / "checkpoints" / "step-00000004") == {"stages": stages[:1]}


def test_what_is_gone_is_left_out(runs, small_config):
    assert run_facts(runs / "nowhere") == {}
    cfg = replace(small_config, init_from=None, data=replace(small_config.data, path=str(runs / "no-data")))
    config.save(cfg, runs / "qat" / "config.yaml")
    (stage,) = run_facts(runs / "qat")["stages"]
    assert stage["data"] == {"code": {"weight": 0.75}, "chat": {"weight": 0.25}}
    assert "init_from" not in stage
    (runs / "qat" / "config.yaml").unlink()
    (stage,) = run_facts(runs / "qat")["stages"]
    assert stage == {"stage": "qat", "steps": 8, "tokens": 4096, "bits_per_byte": {"code": 1.5}}
    (runs / "qat" / "metrics.jsonl").write_text("damaged\n\n")
    assert run_facts(runs / "qat") == {}


def test_runs_that_began_with_each_other_come_to_an_end(runs, small_config):
    config.save(replace(small_config, init_from=str(runs / "qat")), runs / "pretrain" / "config.yaml")
    stages = run_facts(runs / "qat")["stages"]
    assert [(stage["stage"], stage.get("init_from")) for stage in stages] == [("pretrain", "qat"), ("qat", None)]
