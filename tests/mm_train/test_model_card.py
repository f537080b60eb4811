import json
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml

from mm_train import config, model_card
from mm_train.metrics import Metrics


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


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
    checkpoint = tmp_path / "pretrain" / "checkpoints" / "step-00000004"
    checkpoint.mkdir(parents=True)
    (checkpoint / "manifest.json").write_text('{"step": 4}')
    (checkpoint.parent / "latest").write_text("step-00000004\n")
    return tmp_path


def test_what_the_runs_record_is_gathered(runs):
    data = {"code": {"weight": 0.75, "licence": "PSF-2.0"}, "chat": {"weight": 0.25, "licence": "PSF-2.0"}}
    common = {"seq_len": 64, "data": data}
    # The weights of the first stage are those of its checkpoint, not of its last step.
    first = {"stage": "pretrain", "steps": 4, "tokens": 2048, "bits_per_byte": {"code": 2.5}, "init_from": "seed"}
    second = {"stage": "qat", "steps": 8, "tokens": 4096, "bits_per_byte": {"code": 1.5}}
    stages = [first | common | {"quantisation_aware": False}, second | common | {"quantisation_aware": True}]
    facts = model_card.run_facts(runs / "qat")
    assert facts == {"stages": stages}
    assert json.loads(json.dumps(facts)) == facts
    assert model_card.run_facts(runs / "pretrain" / "checkpoints" / "step-00000004") == {"stages": stages[:1]}


def test_what_is_gone_is_left_out(runs, small_config):
    assert model_card.run_facts(runs / "nowhere") == {}
    cfg = replace(small_config, init_from=None, data=replace(small_config.data, path=str(runs / "no-data")))
    config.save(cfg, runs / "qat" / "config.yaml")
    (stage,) = model_card.run_facts(runs / "qat")["stages"]
    assert stage["data"] == {"code": {"weight": 0.75}, "chat": {"weight": 0.25}}
    assert "init_from" not in stage
    (runs / "qat" / "config.yaml").unlink()
    (stage,) = model_card.run_facts(runs / "qat")["stages"]
    assert stage == {"stage": "qat", "steps": 8, "tokens": 4096, "bits_per_byte": {"code": 1.5}}
    (runs / "qat" / "metrics.jsonl").write_text("damaged\n\n")
    assert model_card.run_facts(runs / "qat") == {}


def test_runs_that_began_with_each_other_come_to_an_end(runs, small_config):
    config.save(replace(small_config, init_from=str(runs / "qat")), runs / "pretrain" / "config.yaml")
    stages = model_card.run_facts(runs / "qat")["stages"]
    assert [(stage["stage"], stage.get("init_from")) for stage in stages] == [("pretrain", "qat"), ("qat", None)]


def test_the_card_says_what_is_known(runs, small_model):
    facts = model_card.run_facts(runs / "qat") | {"quantisation": "quantisation-aware training", "weight_bytes": 54321}
    card = model_card.render(small_model, "int4", facts)
    for line in (
        "# small",
        "| parameters | 181,584 |",
        "| of these active for a token | 107,856 |",
        "| context | 256 tokens |",
        "| experts of a layer | 8 of width 32, 2 a token |",
        "| quantised by | quantisation-aware training |",
        "| weight files | 54,321 bytes |",
        "The first stage below began with the weights of `seed`.",
        "| pretrain | 4 | 2.05k | 64 | code 75%, chat 25% |",
        "| qat (quantisation-aware) | 8 | 4.1k | 64 | code 75%, chat 25% |",
        "| code | PSF-2.0 |",
        "| held out | pretrain | qat |",
        "| code | 2.500 | 1.500 |",
        "transformers expands the 4-bit weights when it loads them: in bfloat16 they take 363,168 bytes.",
    ):
        assert line in card, line


def test_the_card_invents_nothing(small_model):
    card = model_card.render(small_model, "bf16", {})
    for word in ("## Training", "quantised", "4-bit", "weight files", "held out", "None", "license:"):
        assert word not in card, word
    assert "No licence is stated" in card
    sparse = model_card.render(small_model, "bf16", {"stages": [{"stage": "sft"}]})
    assert "| sft |  |  |  |  |" in sparse
    assert "licence |" not in sparse


@pytest.mark.parametrize(
    ("change", "says", "is_silent_about"),
    [
        ({}, ["8 routed experts", "shared expert that every token passes", "sigmoid"], ["dense"]),
        ({"num_local_experts": 0}, ["A dense language model", "| MLP of a layer | width 64 |"], ["routed", "active"]),
        ({"intermediate_size_mlp": 0}, ["8 routed experts, of which each token uses 2."], ["shared expert"]),
        ({"scoring_func": "softmax"}, ["scores are a softmax"], ["sigmoid"]),
    ],
)
def test_every_kind_of_network_is_described(small_model, change, says, is_silent_about):
    card = model_card.render(replace(small_model, **change), "bf16", {})
    assert [text for text in says if text not in card] == []
    assert [text for text in is_silent_about if text in card] == []


def test_the_hub_can_read_the_front_matter(small_model):
    moe = front_matter(model_card.render(small_model, "int4", {"license": "cc-by-4.0: x"}))
    assert moe == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mobilemoe", "mixture-of-experts", "int4"],
        "license": "cc-by-4.0: x",
    }
    dense = front_matter(model_card.render(replace(small_model, num_local_experts=0), "bf16", {}))
    assert dense["tags"] == ["mobilemoe"]


def test_names_cannot_break_the_tables(small_model):
    facts = {"stages": [{"stage": "a|b\nc", "data": {"d|e": {"weight": 1.0, "licence": "f\ng"}}}]}
    card = model_card.render(replace(small_model, name="x\n# y"), "bf16", facts)
    assert "\n# x # y\n" in card
    assert "| a\\|b c |  |  |  | d\\|e 100% |" in card
    assert "| d\\|e | f g |" in card


def test_it_does_not_load_torch():
    code = "import sys, mm_train.model_card; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
