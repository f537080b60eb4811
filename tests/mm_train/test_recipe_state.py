"""Where a recipe stands, by real run folders."""

import dataclasses
import json
import shutil
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.__main__ import FORMATS
from mm_train.recipe_plan import EXPORTS, Recipe, load
from mm_train.recipe_state import differences, is_exported, refusal, rows, states
from mm_train.train import train


@pytest.fixture(scope="session")
def recipe_files(tmp_path_factory, small_model, data_set) -> Path:
    """A recipe of two stages of three steps each on the shared data, then a release."""
    folder = tmp_path_factory.mktemp("recipe")
    OmegaConf.save({"model": dataclasses.asdict(small_model)}, folder / "model.yaml")
    stage = {
        "data": {"path": str(data_set), "mixture": {"code": 3, "chat": 1}, "validation": ["code"], "seq_len": 64},
        "train": {"tokens": 3 * 512, "global_batch_tokens": 512, "micro_batch_size": 8, "validation_tokens": 64},
        "optim": {"warmup_steps": 1},
        "checkpoint": {"every": 1},
        "log": {"every": 1, "wandb": "disabled"},
    }
    OmegaConf.save(stage, folder / "first.yaml")
    OmegaConf.save(stage | {"quant": {"enabled": True}}, folder / "second.yaml")
    recipe = {
        "out": str(folder / "none"),
        "model": str(folder / "model.yaml"),
        "stages": {name: {"config": str(folder / f"{name}.yaml")} for name in ("first", "second")},
        "export": {},
    }
    OmegaConf.save(recipe, folder / "recipe.yaml")
    return folder


@pytest.fixture(scope="session")
def first_done(recipe_files, tmp_path_factory) -> Path:
    """Run folders of which the first stage is finished."""
    out = tmp_path_factory.mktemp("first") / "runs"
    train(load(recipe_files / "recipe.yaml", out=str(out)).stages[0].config)
    return out


@pytest.fixture
def at(recipe_files, first_done, tmp_path):
    """A function: the recipe with its first stage finished in a folder of the test's own."""
    shutil.copytree(first_done, tmp_path / "runs")

    def recipe(*overrides: str) -> Recipe:
        return load(recipe_files / "recipe.yaml", str(tmp_path / "runs"), overrides)

    return recipe


def test_before_anything_was_done(recipe_files):
    recipe = load(recipe_files / "recipe.yaml")
    assert [(s.kind, s.progress, s.loss) for s in states(recipe)] == [("not started", "0/3", None)] * 2
    assert rows(recipe, states(recipe))[1][:5] == ["first", "1.54k", "0/3", "", "not started"]
    assert "which is not finished (not started, 0/3 steps): train first first" in refusal(recipe, recipe.stages[1])
    assert refusal(recipe, recipe.stages[0]) is None


def test_a_finished_stage_and_the_next_one(at):
    recipe = at()
    first, second = states(recipe)
    assert (first.kind, first.progress, second.kind) == ("done", "3/3", "not started")
    assert 4 < first.loss < 8
    assert first.trouble is None
    assert refusal(recipe, recipe.stages[1]) is None
    assert rows(recipe, states(recipe))[-1][0] == "export (int4)"


def test_running_and_stopped_are_told_apart_by_the_last_sign_of_life(at):
    recipe = at()
    run = recipe.stages[0].run_dir
    (run / "DONE").unlink()
    assert states(recipe)[0].kind == "stopped"
    beat = {"step": 2, "phase": "forward", "pid": 1}
    for age, kind in ((0, "running"), (3600, "stopped")):
        (run / "heartbeat/rank-00000.json").write_text(json.dumps(beat | {"time": time.time() - age}))
        assert states(recipe)[0].kind == kind
    assert f"({kind}, 3/3 steps)" in refusal(recipe, recipe.stages[1])


@pytest.mark.parametrize(
    ("override", "text"),
    [
        ("first.optim.lr=1e-3", "optim.lr 0.0004 (now 0.001)"),
        ("first.train.tokens=2048", "train.tokens 1536 (now 2048)"),
        ("first.data.mixture.chat=2", "data.mixture {'chat': 0.25, 'code': 0.75} (now {'chat': 0.4, 'code': 0.6})"),
        ("model.num_experts_per_tok=3", "model.num_experts_per_tok 2 (now 3)"),
    ],
)
def test_a_finished_stage_that_would_be_trained_otherwise_now_is_noticed(at, override, text):
    assert states(at(override))[0].trouble == f"first was finished with another configuration: {text}"


@pytest.mark.parametrize(
    "override",
    [
        "log.every=5",
        "parallel.zero_stage=0",
        "checkpoint.keep=9",
        "data.workers=0",
        "second.optim.lr=1",
        "model.name=x",
    ],
)
def test_what_changes_nothing_that_is_learned_is_not(at, override):
    assert states(at(override))[0].trouble is None


def test_equal_shares_are_no_change(small_config):
    other = dataclasses.replace(small_config.data, mixture={"chat": 10, "code": 30, "none": 0})
    assert list(differences(small_config, dataclasses.replace(small_config, data=other))) == []


def test_a_stage_without_the_one_it_came_from(at):
    recipe = at()
    shutil.copytree(recipe.stages[0].run_dir, recipe.stages[1].run_dir)
    shutil.rmtree(recipe.stages[0].run_dir)
    config.save(recipe.stages[1].config, recipe.stages[1].run_dir / "config.yaml")
    assert states(recipe)[1].trouble == "second was begun, but first before it is not started"


def test_epochs_are_counted_where_the_data_is_there(at, recipe_files):
    recipe = at("second.train.tokens=0", "second.train.epochs=1")
    assert states(recipe)[1].total_steps > 3
    recipe = at("second.train.tokens=0", "second.train.epochs=1", "second.data.path=nowhere")
    assert states(recipe)[1].progress == "0/?"
    assert rows(recipe, states(recipe))[2][1] == "?"


def test_a_release_that_is_older_than_the_last_stage_does_not_count(at):
    recipe = at()
    done = recipe.export.run_dir / "DONE"
    assert not is_exported(recipe.export)
    recipe.export.out.mkdir()
    (recipe.export.out / "config.json").touch()
    assert not is_exported(recipe.export)
    done.parent.mkdir()
    done.touch()
    (recipe.export.out / "config.json").touch()
    assert is_exported(recipe.export)
    program = dataclasses.replace(recipe.export, format="executorch")
    assert not is_exported(program)
    (recipe.export.out / "model.pte").touch()
    assert is_exported(program)


def test_a_recipe_can_end_in_everything_that_export_writes():
    assert set(EXPORTS) == set(FORMATS)


def test_a_record_that_cannot_be_read_is_said(at):
    recipe = at()
    (recipe.stages[0].run_dir / "metrics.jsonl").write_text("nonsense\n")
    with pytest.raises(UserError, match=r"metrics.jsonl, line 1: not a metrics record"):
        states(recipe)
