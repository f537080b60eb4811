"""Recipe files: what they say, and what is refused of them. Also: that the project's own have the paper's numbers."""

import re
from pathlib import Path

import pytest
import yaml

from mm_train import config
from mm_train.cli import UserError
from mm_train.recipe_plan import load, prepared_folder

ROOT = Path(__file__).parents[2]
SIZES = ("tiny", "s", "m", "l")
PAPER = {  # arXiv 2605.27358: what configs/stage/ has to say, whatever else stands there
    "pretrain": {
        "train.tokens": 6 * 10**12,
        "data.seq_len": 2048,
        "optim.lr": 4e-4,
        "optim.schedule": "cosine",
        "moe.dispatch": "drop_and_pad",
        "moe.capacity_factor": 1.5,
    },
    "midtrain": {
        "train.tokens": 500 * 10**9,
        "data.seq_len": 8192,
        "optim.lr": 4e-5,
        "optim.schedule": "linear",
        "moe.dispatch": "drop_and_pad",
        "moe.capacity_factor": 1.5,
    },
    "sft": {
        "train.tokens": 126 * 10**9,
        "data.seq_len": 8192,
        "optim.lr": 4e-6,
        "optim.schedule": "cosine",
        "moe.dispatch": "dropless",
    },
    "qat": {
        "train.tokens": 21 * 10**9,
        "data.seq_len": 8192,
        "optim.lr": 4e-6,
        "optim.schedule": "cosine",
        "moe.dispatch": "dropless",
        "quant.enabled": True,
        "quant.activations_int8": True,
        "quant.expert_group_axis": "out",
    },
}
EVERYWHERE = {"moe.bias_update_rate": 1e-3, "moe.z_loss_weight": 1e-4, "parallel.expert_parallel": 4}
NOT_NUMBERS = {"run.stage", "data.path", "data.mixture", "data.validation", "train.dtype"}  # nothing of the paper's


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch):
    monkeypatch.chdir(ROOT)


@pytest.fixture
def recipe_file(tmp_path):
    """A function: a recipe file of these values."""

    def write(**values) -> Path:
        known = {
            "model": "configs/model/tiny.yaml",
            "out": "runs/x",
            "stages": {
                "pretrain": {"config": "configs/stage/tiny/pretrain.yaml"},
                "sft": {"config": "configs/stage/tiny/sft.yaml", "set": ["optim.lr=2e-4"]},
            },
        }
        path = tmp_path / "mine.yaml"
        path.write_text(yaml.safe_dump({key: value for key, value in (known | values).items() if value is not None}))
        return path

    return write


def test_stages_come_in_order_each_from_the_one_before(recipe_file):
    recipe = load(recipe_file(export={"format": "bf16"}))
    assert (recipe.name, recipe.out) == ("mine", Path("runs/x"))
    assert [(s.name, s.run_dir, s.init_from) for s in recipe.stages] == [
        ("pretrain", Path("runs/x/pretrain"), None),
        ("sft", Path("runs/x/sft"), Path("runs/x/pretrain")),
    ]
    assert recipe.export.words == ["--checkpoint", "runs/x/sft", "--out", "runs/x/export", "--format", "bf16"]


def test_the_words_of_a_stage_are_its_configuration(recipe_file):
    """What mm_train.train makes of the words is what the recipe checked."""
    recipe = load(recipe_file(), overrides=["log.every=3", "sft.train.seed=5"])
    for stage in recipe.stages:
        assert config.load_words(stage.words) == stage.config
    assert [s.config.log.every for s in recipe.stages] == [3, 3]
    assert [s.config.train.seed for s in recipe.stages] == [0, 5]
    assert [s.config.optim.lr for s in recipe.stages] == [3e-3, 2e-4]


def test_the_command_line_comes_last_and_out_moves_everything(recipe_file):
    recipe = load(recipe_file(set=["log.every=7"]), out="elsewhere", overrides=["sft.optim.lr=1", "sft.log.every=1"])
    assert recipe.stage("sft").config.optim.lr == 1
    assert [s.config.log.every for s in recipe.stages] == [7, 1]
    assert recipe.stage("sft").words[-1] == "init_from=elsewhere/pretrain"


def test_a_chain_can_start_from_weights_that_are_there(recipe_file):
    assert load(recipe_file(init_from="runs/base")).stages[0].init_from == Path("runs/base")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"modle": "x"}, r"mine.yaml: unknown key modle \(did you mean model\?\)"),
        ({"stages": {"sft": {"confg": "x"}}}, r"unknown key stages.sft.confg \(did you mean stages.sft.config\?\)"),
        ({"stages": {"sft": {}}}, r"stages.sft.config is empty: name its stage file"),
        ({"stages": None}, r"mine.yaml has no stages"),
        ({"stages": {"optim": {"config": "x"}}}, r"a stage cannot be called 'optim'"),
        ({"stages": {"../up": {"config": "x"}}}, r"a stage cannot be called '../up'"),
        ({"model": None}, r"model is empty"),
        ({"out": None}, r"out is empty"),
        ({"export": {"format": "int3"}}, r"export.format is 'int3'; it must be"),
        ({"stages": {"sft": {"config": "none.yaml"}}}, r"mine.yaml, stage sft: config file not found: none.yaml"),
        ({"set": ["optim.lr=-1"]}, r"mine.yaml, stage pretrain: optim.lr is -1.0; it must be above 0"),
        ({"set": "optim.lr=1"}, r"mine.yaml: set: "),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_place(recipe_file, values, message):
    with pytest.raises(UserError, match=message):
        load(recipe_file(**values))


@pytest.mark.parametrize("word", ["run.dir=x", "init_from=x"])
def test_folders_are_the_recipes_own(recipe_file, word):
    with pytest.raises(UserError, match=r"sets run.\* and init_from itself; another folder is --out"):
        load(recipe_file(), overrides=[word])


def test_files_that_are_none(tmp_path):
    with pytest.raises(UserError, match="file not found: "):
        load(tmp_path / "none.yaml")
    (tmp_path / "torn.yaml").write_text("a: [")
    with pytest.raises(UserError, match=r"torn.yaml is not readable YAML"):
        load(tmp_path / "torn.yaml")


@pytest.mark.parametrize("size", SIZES)
def test_the_recipe_of_every_size_is_whole(size):
    """Its stages read what their data configurations prepare, with the weights that are written there."""
    recipe = load(ROOT / f"configs/recipe/{size}.yaml")
    assert [stage.name for stage in recipe.stages] == ["pretrain", "midtrain", "sft", "qat"]
    for stage in recipe.stages:
        data = stage.config.data
        assert prepared_folder(stage.data_config) == data.path
        sources = yaml.safe_load(stage.data_config.read_text())["sources"]
        assert set(data.mixture) | set(data.validation) <= set(sources)
        assert data.validation  # and how often is a matter of train.validate_every
        for name, weight in data.mixture.items():
            assert weight == sources[name].get("weight", weight)
        domains = {source.get("domain") for source in sources.values()}
        assert {sources[name].get("domain") for name in data.validation} == domains or size == "tiny"
        row = {s.get("row_length") for n, s in sources.items() if n in data.mixture and s.get("layout") == "packed"}
        assert row <= {data.seq_len + 1}
        # Without it training would say nothing of held-out text before the end.
        assert size == "tiny" or 0 < stage.config.train.validate_every < stage.config.total_steps
    assert recipe.export.format == "int4"
    lengths = [stage.config.data.seq_len for stage in recipe.stages]
    assert lengths == ([256, 512, 512, 512] if size == "tiny" else [2048, 8192, 8192, 8192])


def lines_with_keys(path: Path):
    """(dotted key, value, comment) of every value of a stage file; a flow mapping's comment is that of its line."""
    text = path.read_text()
    for node_path, node in leaves(yaml.compose(text)):
        line = text.splitlines()[node.end_mark.line if node.end_mark.column else node.end_mark.line - 1]
        yield ".".join(node_path), yaml.safe_load(yaml.serialize(node)), line.partition("#")[2].strip()


def leaves(node, path=()):
    for key, value in node.value:
        below = (*path, key.value)
        if isinstance(value, yaml.MappingNode) and below[-1] != "mixture":
            yield from leaves(value, below)
        else:
            yield below, value


@pytest.mark.parametrize("stage", PAPER)
def test_a_stage_file_has_the_numbers_of_the_paper_and_marks_all_others_as_ours(stage):
    wanted, found = PAPER[stage] | EVERYWHERE, {}
    for key, value, comment in lines_with_keys(ROOT / f"configs/stage/{stage}.yaml"):
        if key in wanted:
            found[key] = value
            assert not re.match(r"ours\b", comment), f"{key} is the paper's"
        elif key not in NOT_NUMBERS:
            assert re.match(r"ours\b", comment), f"{key}: {value} is neither the paper's nor marked as ours"
    assert found == wanted
