"""The shape rules: S, M and L come out exactly, and what is written loads."""

from dataclasses import replace
from pathlib import Path

import pytest

from mm_train import config
from mm_train.cli import UserError
from mm_train.rules import validate_model
from mm_train.scaling_law.shapes import candidates, count, network, yaml

ROOT = Path(__file__).parents[3]


def model_of(path: Path):
    return config.load([path], check=lambda cfg: validate_model(cfg.model)).model


@pytest.mark.parametrize(
    ("name", "width", "layers", "expansion", "granularity", "shared"),
    [
        ("s", 768, 20, 8, 8, True),
        ("m", 1024, 26, 8, 8, True),
        ("l", 1280, 32, 8, 8, True),
        ("s-dense", 768, 20, 1, 8, True),
        ("s-coarse", 768, 20, 8, 1, False),
        ("s-noshared", 768, 20, 8, 8, False),
    ],
)
def test_the_published_networks(name, width, layers, expansion, granularity, shared):
    want = model_of(ROOT / f"configs/model/{name}.yaml")
    assert replace(network(width, layers, expansion, granularity, shared), name=want.name) == want


@pytest.mark.parametrize("expansion", [1, 2, 8, 32])
def test_every_candidate_keeps_the_rules_and_is_counted_exactly(expansion):
    found = list(candidates(expansion, 8, True))
    assert len(found) > 300
    for model, active, total in found[::37]:
        assert count(model) == (active, total)
        assert 32 <= model.hidden_size / model.num_hidden_layers <= 48
        assert model.num_attention_heads % 4 == 0
        assert abs(model.num_attention_heads * 64 - model.hidden_size) <= 128
        met = model.num_experts_per_tok * model.intermediate_size + model.intermediate_size_mlp
        assert met == 4 * model.hidden_size
        if expansion > 1:
            there = model.num_local_experts * model.intermediate_size + model.intermediate_size_mlp
            assert there == expansion * met


def test_a_shared_expert_needs_an_even_granularity():
    with pytest.raises(UserError, match="granularity 1 with a shared expert does not divide"):
        network(768, 20, 8, 1, True)


@pytest.mark.parametrize(("expansion", "granularity", "shared"), [(1, 8, True), (8, 8, True), (8, 1, False)])
def test_what_is_written_loads_as_it_was(tmp_path, expansion, granularity, shared):
    model = network(512, 12, expansion, granularity, shared)
    path = tmp_path / "model.yaml"
    path.write_text(yaml(model, "two\nlines"))
    assert model_of(path) == model
