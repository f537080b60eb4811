"""What a sweep trains, against counts made by hand and the model files of the paper."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_train import config
from mm_train.cli import UserError
from mm_train.inventory import active_parameters, parameters
from mm_train.scaling_law.spec import experts, load, runs, share, short_count

SWEEPS = sorted(Path("configs/sweep").glob("*.yaml"))


def model(name: str) -> config.Model:
    return config.load([f"configs/model/{name}.yaml"], check=lambda cfg: None).model


@pytest.mark.parametrize(
    ("name", "expansion", "granularity", "shared"),
    [("s", 8, 8, True), ("s-noshared", 8, 8, False), ("s-coarse", 8, 1, False), ("s-dense", 1, 8, True)],
)
def test_the_networks_of_the_paper_are_points_of_a_sweep(name, expansion, granularity, shared):
    dense, wanted = model("s-dense"), model(name)
    made = replace(dense, name=wanted.name, **experts(dense, expansion, granularity, shared))
    assert made == wanted


@given(
    expansion=st.integers(1, 64),
    granularity=st.sampled_from([1, 2, 4, 8, 16]),
    shared=st.booleans(),
    hidden=st.sampled_from([32, 64, 96]),
)
def test_active_parameters_are_equal_but_for_the_router(expansion, granularity, shared, hidden):
    dense = config.Model(
        hidden_size=hidden,
        intermediate_size=0,
        intermediate_size_mlp=4 * hidden,
        num_local_experts=0,
        num_experts_per_tok=0,
    )
    if shared and granularity == 1 and expansion > 1:
        with pytest.raises(UserError, match="must be even"):
            experts(dense, expansion, granularity, shared)
        return
    made = replace(dense, **experts(dense, expansion, granularity, shared))
    active, total = active_parameters(made), parameters(made)
    router = made.num_hidden_layers * made.num_local_experts * (hidden + 1)  # weights and selection bias
    assert sum(active.values()) - sum(active_parameters(dense).values()) == pytest.approx(
        router, abs=made.num_hidden_layers * made.num_local_experts
    )
    mlp = 3 * hidden * 4 * hidden * made.num_hidden_layers
    assert total.get("routed experts", 0) + total.get("shared expert", 0) + total.get("mlp", 0) == expansion * mlp


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_file_makes_runs(path):
    found = runs(load(path))
    assert len({run.name for run in found}) == len(found) > 1
    for run in found:
        assert run.config.run.dir.endswith(run.name)


def test_what_two_points_have_in_common_is_trained_once(spec):
    names = [run.name for run in runs(load(spec("points: [{expansion: [1, 2]}, {expansion: [2], granularity: [8]}]")))]
    assert len(names) == 2


def test_the_tasks_of_an_array_share_the_runs_out(spec):
    everything = runs(load(spec("points: [{expansion: [1, 2, 4]}]")))
    parts = [list(share(everything, rank, 2)) for rank in range(2)]
    assert sorted(run.name for part in parts for run in part) == sorted(run.name for run in everything)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("points: []", "points is empty"),
        ("points: [{expansions: [1]}]", r"unknown key points\[0\].expansions \(did you mean points\[0\].expansion"),
        ("points: {expansion: [1]}", "points must be a list"),
        ("points: [{expansion: [x]}]", "could not be converted"),
        ("points: [{granularity: [3]}]", "granularity .3. must divide"),
        ("points: [{granularity: [1]}]", "must be even"),
        ("points: [{expansion: [0]}]", "must be at least 1"),
        ("points: [{}, {overrides: [optim.lr=1]}]", "give one of them a `variant`"),
        ("points: [{overrides: [optim.lrr=1]}]", "unknown key optim.lrr"),
        (
            "points: [{overrides: [model.num_local_experts=4, model.num_experts_per_tok=2,"
            " model.intermediate_size=32]}]",
            "not 0",
        ),
        ("points: [", "not readable YAML"),
    ],
)
def test_a_sweep_that_cannot_work_is_refused(spec, text, message):
    with pytest.raises(UserError, match=message):
        runs(load(spec(text)))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="sweep file not found"):
        load(tmp_path / "none.yaml")


def test_counts_for_names():
    assert [short_count(n) for n in (999, 1_638_400, 3 * 10**11)] == ["999", "1.64M", "300B"]
