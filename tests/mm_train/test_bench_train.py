"""What is compared is comparable, and what goes wrong in a process is said in one line. No timing is asserted."""

import dataclasses
import json

import pytest
import torch

from mm_train import config
from mm_train.bench_train import Runner, Way, compare, main, summary, text, ways
from mm_train.bench_train_worker import RandomRows, TransformersTraining, glm4_moe
from mm_train.cli import UserError
from mm_train.costs import train_flops
from mm_train.inventory import parameters


@pytest.fixture
def cfg(small_model) -> config.Config:
    cfg = config.Config(model=small_model)
    cfg.data.seq_len = 32
    cfg.train = config.Train(tokens=1024, global_batch_tokens=256, micro_batch_size=2)
    cfg.optim = config.Optim(warmup_steps=1)
    return cfg


@pytest.mark.slow  # a minute and more, of which nearly all is starting seven processes
def test_every_way_trains_the_same(cfg):
    """One process, two ranks and transformers start from the same loss; ours go on alike."""
    found = compare([*ways(cfg, 2)[:2], ways(cfg, 1)[-1]], threads=2, steps=1, repeats=1)
    one, two, theirs = found.values()
    assert one["parameters"] == two["parameters"]
    assert one["loss"] == pytest.approx(two["loss"], abs=1e-5)
    assert one["loss"] == pytest.approx(theirs["loss"], abs=0.1)
    assert all(speed > 0 for way in found.values() for speed in way["tokens_per_second"])
    facts = summary(cfg, found) | {"steps": 1, "repeats": 1, "threads": 2}
    json.dumps(facts)
    assert one["times_the_first"] == 1
    report = text(facts)
    for name in found:
        assert name in report


def test_what_is_compared(cfg):
    names = [way.name for way in ways(cfg, 2)]
    assert names == [
        "this trainer, 1 process",
        "this trainer, 2 ranks, expert_parallel=2",
        "this trainer, 2 ranks, expert_parallel=1",
        "transformers, experts grouped_mm",
        "transformers, experts eager",
    ]
    assert [way.name for way in ways(cfg, 1)] == [name for name in names if "ranks" not in name]


@pytest.mark.parametrize("experts", ["grouped_mm", "eager"])
def test_the_other_model_has_our_shape(small_model, experts):
    model = glm4_moe(small_model, experts)
    ours = sum(parameters(small_model).values()) - 2 * small_model.num_local_experts  # without the selection biases
    norms = 2 * small_model.num_hidden_layers * small_model.head_dim  # of queries and keys, which have no weights here
    assert sum(p.numel() for p in model.parameters()) == ours + norms
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config._experts_implementation == experts
    assert model.config._attn_implementation == "sdpa"
    assert model.model.rotary_emb.inv_freq.numel() == small_model.head_dim // 2  # whole heads are turned


def test_the_other_model_learns(cfg):
    training = TransformersTraining(cfg, "grouped_mm")
    losses = [training.step() for _ in range(4)]
    assert losses[-1] < losses[0]


def test_the_other_model_predicts_the_labels_of_our_batches(cfg):
    from mm_train.bench_train_worker import _labels

    (batch, *_) = RandomRows(cfg).micro_batches(0, 8, 2, 0, 1)
    given = _labels(batch)  # transformers shifts: the label of a token is at its own place
    assert torch.equal(given[:, 1:], batch.labels_BT[:, :-1])


def test_random_rows_are_shared_out_as_data_is(cfg):
    rows = RandomRows(cfg)
    whole = torch.cat([batch.tokens_BT for batch in rows.micro_batches(0, 8, 2, 0, 1)])
    parts = [list(rows.micro_batches(0, 8, 2, rank, 2)) for rank in (0, 1)]
    assert torch.equal(whole, torch.cat([b.tokens_BT for pair in zip(*parts, strict=True) for b in pair]))
    assert whole.shape == (8, 32)
    (batch, *_) = rows.micro_batches(0, 8, 8, 0, 1)
    assert torch.equal(batch.labels_BT[:, :-1] == -100, batch.document_BT.diff() > 0)


def test_this_trainer_alone_needs_nothing_to_compare_with(capsys):
    """A network that the other has not, and the figures of --json; on a CPU there is no peak to divide by."""
    words = "configs/model/tiny.yaml model.scoring_func=softmax model.num_hidden_layers=2 data.seq_len=64"
    words += " train.micro_batch_size=2 train.global_batch_tokens=256 train.tokens=2048 optim.warmup_steps=1"
    assert main([*words.split(), "--alone", "--json", "--steps", "1", "--repeats", "2", "--threads", "1"]) == 0
    facts = json.loads(capsys.readouterr().out)
    ((name, way),) = facts["ways"].items()
    assert name == "this trainer, 1 process"
    assert len(way["tokens_per_second"]) == 2
    assert way["device"] == "cpu"
    assert way["mfu"] is None
    assert 0.1 < way["memory_gib"]["host"] < 10
    assert text(facts).count("\n") == 4


def test_mfu_is_of_the_model_and_all_devices(cfg):
    flops = sum(train_flops(cfg.model, cfg.data.seq_len).values())
    way = {"parameters": 1, "tokens_per_second": [10.0], "loss": 1.0, "peak_flops": 40.0 * flops, "ranks": 2}
    assert summary(cfg, {"this trainer, 2 ranks": way})["ways"]["this trainer, 2 ranks"]["mfu"] == 10 / 40 / 2


def test_a_process_that_fails_is_one_line(cfg):
    cfg.data = config.Data(path="nowhere", mixture={"web": 1.0}, seq_len=32)
    runner = Runner(Way("this trainer", cfg), threads=1)
    try:
        with pytest.raises(UserError, match=r"this trainer: .*nowhere"):
            runner.start()
    finally:
        runner.close()


def test_models_of_other_sizes_are_no_comparison(cfg):
    found = {
        "this trainer, 1 process": {"parameters": 100, "tokens_per_second": [1.0], "loss": 1.0},
        "transformers, experts eager": {"parameters": 103, "tokens_per_second": [1.0], "loss": 1.0},
    }
    with pytest.raises(UserError, match="103 parameters and this trainer's model 100: more than 2% apart"):
        summary(cfg, found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("configs/model/s-dense.yaml", "mobilemoe-s-dense is dense: there are no experts to compare"),
        ("configs/model/s-softmax.yaml", "model.scoring_func is 'softmax'; the model to compare with has sigmoid"),
        ("configs/model/s-noshared.yaml", "model.intermediate_size_mlp (0) must be a multiple of intermediate_size"),
        ("configs/model/tiny.yaml --repeats 0", "--steps, --repeats, --ranks and --threads must be at least 1"),
        ("configs/model/tiny.yaml --ranks 3", "parallel.expert_parallel (3) must divide model.num_local_experts (16)"),
        ("configs/model/tiny.yaml train.global_batch_tokens=4096 --ranks 2", "must be a multiple of"),
        ("configs/model/tiny.yaml model.width=3", "unknown key model.width"),
    ],
)
def test_what_cannot_be_compared_is_refused(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_ratios_are_of_measurements_that_followed_each_other(cfg):
    found = {
        "this trainer, 1 process": {"parameters": 100, "tokens_per_second": [1.0, 4.0, 2.0], "loss": 1.0},
        "transformers, experts eager": {"parameters": 101, "tokens_per_second": [0.5, 2.0, 3.0], "loss": 1.0},
    }
    facts = summary(dataclasses.replace(cfg), found)
    assert facts["ways"]["transformers, experts eager"]["times_the_first"] == 0.5
    assert facts["ways"]["transformers, experts eager"]["median"] == 2.0
