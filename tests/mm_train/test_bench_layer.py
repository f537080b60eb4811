"""Every way computes the same, and a way that does not is found. No timing is asserted."""

import json

import pytest
import torch

from mm_train.bench_layer import TOLERANCE, Turn, errors, main, measure, summary, text
from mm_train.bench_layer_ways import WEIGHTS, ways
from mm_train.cli import UserError

TINY = ["configs/model/tiny.yaml", "--tokens", "24", "--repeats", "2"]


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_way_gives_the_same_output_and_gradients(small_model, dtype):
    found = ways(small_model, getattr(torch, dtype), torch.device("cpu"))
    x, dy = (torch.randn(50, small_model.hidden_size).to(getattr(torch, dtype)) for _ in range(2))
    wrong_by = errors(found, x.requires_grad_(), dy, TOLERANCE[dtype])
    assert list(wrong_by) == [name for name, way in found.items() if way.compared]
    assert len(wrong_by) == 4 + (dtype == "bfloat16")
    for facts in wrong_by.values():
        assert list(facts) == ["output", "input", *WEIGHTS]


@pytest.mark.parametrize("weight", range(len(WEIGHTS)))
def test_one_other_weight_is_found(small_model, weight):
    found = ways(small_model, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        found["transformers, experts eager"].weights[weight].mul_(1.01)
    x, dy = (torch.randn(50, small_model.hidden_size) for _ in range(2))
    with pytest.raises(UserError, match=r"transformers, experts eager computes something else: the relative error"):
        errors(found, x.requires_grad_(), dy, TOLERANCE["float32"])


def test_the_command_shows_every_way_for_both_dtypes(capsys):
    assert main(TINY) == 0
    output = capsys.readouterr().out
    assert output.count("this layer, drop-and-pad at 1.5") == 2
    assert output.count("Python loop, in float32 ") >= 1
    assert output.count("best of the others: ") == 2
    assert "24 tokens; " in output


def test_the_facts_as_json(capsys):
    assert main([*TINY, "--dtype", "bfloat16", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert list(facts["dtypes"]) == ["bfloat16"]
    for way in facts["dtypes"]["bfloat16"]["ways"].values():
        assert len(way["seconds"]) == 2
        for turn in way["seconds"]:
            assert turn["forward"] + turn["backward"] == pytest.approx(turn["both"])


def test_a_way_that_takes_too_long_is_left_out(small_model):
    measured = measure(small_model, 24, 1, "float32", patience=0)
    timed = [name for name, way in measured["ways"].items() if "seconds" in way]
    assert timed == ["this layer, dropless"]
    assert measured["best_of_the_others"] is None
    facts = {"model": "small", "tokens": 24, "device": "CPU", "threads": 1, "repeats": 1}
    assert text(facts | {"dtypes": {"float32": measured}}).count("left out: ") == 4


def test_ratios_are_of_turns_of_the_same_round(small_model):
    found = ways(small_model, torch.float32, torch.device("cpu"))
    ours, padded, loop, *_ = found
    turns = {
        ours: [Turn(1, 1, 2, 2), Turn(4, 4, 8, 8), Turn(2, 2, 4, 4)],
        padded: [Turn(0.1, 0.1, 0.2, 0.2)] * 3,
        loop: [Turn(1, 2, 3, 3), Turn(4, 8, 12, 12), Turn(9, 9, 18, 18)],
    }
    facts = summary(found, turns, {}, dict.fromkeys(found, 1.0))
    assert facts["ways"][loop]["times_the_first"] == {"forward": 1, "backward": 2, "both": 1.5, "processor": 1.5}
    assert facts["ways"][loop]["spread"] == [1.5, 4.5]
    assert facts["best_of_the_others"] == loop  # padding is other work


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("configs/model/s-dense.yaml", "mobilemoe-s-dense is dense: there are no experts to compare"),
        ("configs/model/s-softmax.yaml", "model.scoring_func is 'softmax'; the model to compare with has sigmoid"),
        ("configs/model/tiny.yaml --tokens 0", "--tokens, --repeats and --threads must be at least 1"),
        ("configs/model/tiny.yaml --dtype float32,int8", "--dtype has 'int8'; known are float32, bfloat16"),
        ("configs/model/none.yaml", "configs/model/none.yaml"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message, capsys):
    assert main(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
