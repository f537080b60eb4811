"""Averages of checkpoints against numpy, bit for bit, and where they can be used."""

import numpy as np
import pytest
import torch

from mm_train.checkpoint.__main__ import main
from mm_train.checkpoint.average import average, weights
from mm_train.checkpoint.convert import convert
from mm_train.checkpoint.folders import complete
from mm_train.checkpoint.reader import Reader
from mm_train.checkpoint.writer import Writer
from mm_train.cli import UserError
from mm_train.export import __main__ as export
from mm_train.inventory import is_buffer
from mm_train.model_folder import load_model
from mm_train.train import train
from tests.mm_train.checkpoint.layouts import FACTS, engines, random_state, together, world

LAYOUTS = ({"ep": 2, "tp": 2}, {"ep": 1, "tp": 1}, {"ep": 4, "tp": 1})


@pytest.fixture
def states(small_config, tmp_path):
    """Three states of a network, each saved by another layout of ranks into the run `tmp_path / "run"`."""
    small_config.checkpoint.asynchronous, small_config.checkpoint.keep = False, 9
    states = []
    for number, layout in enumerate(LAYOUTS):
        state = random_state(small_config.model, seed=number)
        groups = world(**layout)
        ranks = engines(small_config.model, state, groups)
        writers = [Writer(tmp_path / "run", member, small_config) for member in groups]
        together(groups, lambda rank: writers[rank].save(10 + number, ranks[rank], FACTS))  # noqa: B023
        states.append(state["weight"])
    return states


@pytest.mark.parametrize("ema", [None, 0.25])
def test_it_is_numpys_average_bit_for_bit_whatever_layouts_wrote(states, tmp_path, monkeypatch, ema):
    monkeypatch.setattr("mm_train.checkpoint.convert.PIECE", 1000)  # pieces of tensors
    made = Reader(average([tmp_path / "run"], tmp_path / "out", last=3, ema=ema)).verify()
    shares = np.array([1 / 3] * 3 if ema is None else [1 / 21, 4 / 21, 16 / 21])
    exact = weights(3, ema)
    assert np.array(exact) == pytest.approx(shares, abs=1e-15)
    for name in made.names():
        stack = [share * state[name].numpy().astype(np.float64) for share, state in zip(exact, states, strict=True)]
        want = ((stack[0] + stack[1]) + stack[2]).astype(np.float32)
        assert np.array_equal(made.read(name).numpy(), want), name
    assert made.kinds == ("weight",)
    assert made.step == 12
    assert [source["step"] for source in made.manifest["average"]] == [10, 11, 12]


def test_named_checkpoints_count_in_their_order(states, tmp_path):
    first, _, last = complete(tmp_path / "run")[::-1]
    made = Reader(average([last, first], tmp_path / "out", ema=0.5))
    name = "model.embed_tokens.weight"
    want = (states[2][name].double() / 3 + states[0][name].double() * 2 / 3).float()
    torch.testing.assert_close(made.read(name), want, rtol=0, atol=1e-6)


def test_the_selection_bias_is_averaged_too(states, tmp_path):
    made = Reader(average([tmp_path / "run"], tmp_path / "out", last=2))
    (name, *_) = [name for name in made.names() if is_buffer(name)]
    torch.testing.assert_close(made.read(name), (states[1][name] + states[2][name]) / 2)


def test_an_average_is_used_as_any_weights_are(small_config, tmp_path, capsys):
    small_config.checkpoint.keep = 9
    assert train(small_config) == 0
    assert main(["average", small_config.run.dir, "--last", "3", "--out", str(tmp_path / "mean")]) == 0
    assert "the average of steps 4 (0.333), 8 (0.333), 12 (0.333)" in capsys.readouterr().out
    tokens = torch.arange(20)[None]
    logits = load_model(tmp_path / "mean")(tokens)
    assert not torch.equal(logits, load_model(small_config.run.dir)(tokens))
    assert (
        export.main(["--checkpoint", str(tmp_path / "mean"), "--out", str(tmp_path / "bf16"), "--format", "bf16"]) == 0
    )
    torch.testing.assert_close(load_model(tmp_path / "bf16")(tokens), logits, rtol=0.05, atol=0.05)
    small_config.init_from, small_config.run.dir = str(tmp_path / "mean"), str(tmp_path / "next")
    assert train(small_config) == 0
    assert main(["inspect", str(tmp_path / "mean")]) == 0
    assert "average  of steps 4 (0.333)" in capsys.readouterr().out
    small_config.init_from, small_config.resume_from = None, str(tmp_path / "mean")
    small_config.run.dir = str(tmp_path / "resumed")
    with pytest.raises(UserError, match="holds weights only"):
        train(small_config)


def test_what_cannot_be_averaged_is_refused(states, small_config, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    (newest, *_) = complete(run)
    for paths, options, message in (
        ([run], {"last": 4}, r"--last is 4, and .* has 3 checkpoints: runs keep checkpoint\.keep"),
        ([run], {"last": 1}, "--last is 1; it must be at least 2"),
        ([run, run], {"last": 2}, "--last counts the checkpoints of one run, not of 2"),
        ([run], {}, "alone is no average"),
        ([run], {"last": 2, "ema": 1.0}, r"--ema is 1\.0; it must lie between 0 and 1"),
    ):
        with pytest.raises(UserError, match=message):
            average(paths, out, **options)
    small_config.model.routed_scaling_factor = 1.0
    writer = Writer(tmp_path / "other", world()[0], small_config)
    writer.save(1, engines(small_config.model, random_state(small_config.model), world())[0], FACTS)
    with pytest.raises(UserError, match=r"cannot be averaged with .*routed_scaling_factor is 1\.0 there and 2\.5 here"):
        average([tmp_path / "other", newest], out)
    copy = convert(newest, tmp_path / "copy", 1, weights_only=False)
    data = bytearray((copy / "rank-00000.safetensors").read_bytes())
    data[-9] ^= 1
    (copy / "rank-00000.safetensors").write_bytes(data)
    with pytest.raises(UserError, match=r"is damaged: rank-00000\.safetensors"):
        average([copy, newest], out)
    assert not out.exists()
    out.mkdir()
    with pytest.raises(UserError, match="exists already"):
        average([run], out, last=2)
