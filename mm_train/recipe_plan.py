"""A recipe: the stages of a training in their order, as one file describes them. Torch-free.

    recipe = load(Path("configs/recipe/tiny.yaml"), out="runs/mine", overrides=["sft.optim.lr=1e-4"])
    for stage in recipe.stages:
        stage.words         # what mm_train.train is started with

A recipe file names the model file, and for each stage its stage file and the configuration of its data set:

    name: tiny
    out: runs/tiny                              # every stage gets a run folder OUT/STAGE
    model: configs/model/tiny.yaml
    set: [log.project=mine]                     # overrides of every stage
    stages:
      pretrain: {config: configs/stage/tiny/pretrain.yaml, data: configs/data/quickstart.yaml}
      sft: {config: configs/stage/tiny/sft.yaml, set: [train.epochs=2, train.tokens=0]}
    export: {format: int4, out: export}         # of the last stage, to OUT/export

The first stage starts from chance (or from `init_from`), each of the others from the one before it. Paths are relative
to where the command is run, as in all other configuration. Whoever starts the stages (mm_train.recipe here, a batch
system elsewhere) reads the same description.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mm_train import config
from mm_train.cli import UserError
from mm_train.config import Config
from mm_train.release_format import FORMATS

DEVICE_FILES = {"gguf": "model.gguf", "executorch": "model.pte"}  # format -> what its folder holds
EXPORTS = (*FORMATS, *DEVICE_FILES)  # that mm_train.export can write
SECTIONS = tuple(f.name for f in fields(Config))  # of a config: names that no stage may have


@dataclass
class StageEntry:
    """A stage in the file."""

    config: str = ""  # stage file
    data: str = ""  # configuration of its data set, for data_prep.run; empty: it is somebody else's
    set: list[str] = field(default_factory=list)  # overrides


@dataclass
class ExportEntry:
    """What is made of the last stage."""

    format: str = "int4"  # of EXPORTS
    out: str = "export"  # folder in OUT


@dataclass
class RecipeFile:
    """The file, with its types."""

    name: str = ""
    out: str = ""
    model: str = ""
    init_from: str = ""  # run, checkpoint or release that the first stage starts from; empty: chance
    set: list[str] = field(default_factory=list)
    stages: dict[str, StageEntry] = field(default_factory=dict)
    export: ExportEntry | None = None


@dataclass(frozen=True)
class Stage:
    """One stage, resolved."""

    name: str
    files: tuple[str, ...]  # model file, stage file
    overrides: tuple[str, ...]  # of the recipe, of the stage, of the command line; then run.dir and init_from
    config: Config  # of all of them, checked; train.epochs is not counted yet (mm_train.budget)
    data_config: Path | None

    @property
    def words(self) -> list[str]:
        """Config words of mm_train.train."""
        return [*self.files, *self.overrides]

    @property
    def run_dir(self) -> Path:
        return Path(self.config.run.dir)

    @property
    def init_from(self) -> Path | None:
        """Run folder of the stage before; None for a first one that starts from chance."""
        return Path(self.config.init_from) if self.config.init_from else None


@dataclass(frozen=True)
class Export:
    """The last step: a release of the last stage."""

    run_dir: Path  # of that stage
    out: Path
    format: str

    @property
    def words(self) -> list[str]:
        """Words of mm_train.export."""
        return ["--checkpoint", str(self.run_dir), "--out", str(self.out), "--format", self.format]


@dataclass(frozen=True)
class Recipe:
    """A whole training."""

    name: str
    out: Path
    stages: tuple[Stage, ...]  # in their order
    export: Export | None

    def stage(self, name: str) -> Stage:
        """The stage of this name. Raises UserError when there is none."""
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise UserError(f"no stage {name!r} in recipe {self.name}; it has {', '.join(s.name for s in self.stages)}")


def load(path: Path, out: str | None = None, overrides: Iterable[str] = ()) -> Recipe:
    """The recipe in a file. `out` is a folder in place of the file's.

    `overrides` are `section.key=value` for every stage and `STAGE.section.key=value` for one. Raises UserError for
    what is missing, unknown, or does not pass the rules of a training run, with the name of the stage.
    """
    recipe = _read(path)
    if out is not None:
        recipe.out = out
    if not recipe.out:
        raise UserError(f"{path}: out is empty: say where the run folders go")
    everywhere, own = _sorted(recipe, overrides)
    stages: list[Stage] = []
    for name, entry in recipe.stages.items():
        run_dir = Path(recipe.out) / name
        chain = [f"run.dir={run_dir}", f"run.stage={name}"]
        before = str(stages[-1].run_dir) if stages else recipe.init_from
        chain += [f"init_from={before}"] if before else []
        files = (recipe.model, entry.config)
        words = (*recipe.set, *entry.set, *everywhere, *own.get(name, ()), *chain)
        try:
            cfg = config.load(files, words)
        except UserError as error:
            raise UserError(f"{path}, stage {name}: {error}") from None
        stages.append(Stage(name, files, words, cfg, Path(entry.data) if entry.data else None))
    export = recipe.export
    made = Export(stages[-1].run_dir, Path(recipe.out) / export.out, export.format) if export else None
    return Recipe(recipe.name or path.stem, Path(recipe.out), tuple(stages), made)


def prepared_folder(data_config: Path) -> str:
    """Where the data set of a data configuration goes: its `out`. Raises UserError when it cannot be read."""
    return str(_yaml(data_config).get("out") or "")


def _read(path: Path) -> RecipeFile:
    """The file as it is, with its types checked."""
    values = _yaml(path)
    config.refuse_unknown(values, RecipeFile, "", str(path))
    try:
        recipe: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(RecipeFile), values))
    except OmegaConfBaseException as error:
        key = f" {error.full_key}:" if error.full_key else ""
        raise UserError(f"{path}:{key} {str(error.msg or error).splitlines()[0]}") from None
    assert isinstance(recipe, RecipeFile)
    if not recipe.stages:
        raise UserError(f"{path} has no stages: name at least one, with its config")
    for name, entry in recipe.stages.items():
        if name in SECTIONS or not name.replace("-", "").replace("_", "").isalnum():
            raise UserError(f"{path}: a stage cannot be called {name!r}: it names a folder, and no part of a config")
        if not entry.config:
            raise UserError(f"{path}: stages.{name}.config is empty: name its stage file")
    if not recipe.model:
        raise UserError(f"{path}: model is empty: name a model file")
    if recipe.export and recipe.export.format not in EXPORTS:
        raise UserError(f"{path}: export.format is {recipe.export.format!r}; it must be {' or '.join(EXPORTS)}")
    return recipe


def _yaml(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise UserError(f"file not found: {path}")
    try:
        values = OmegaConf.to_container(OmegaConf.load(path))
    except Exception as error:  # OmegaConf hands on whatever its YAML parser raises
        raise UserError(f"{path} is not readable YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} must be a mapping of keys")
    return {str(key): value for key, value in values.items()}


def _sorted(recipe: RecipeFile, overrides: Iterable[str]) -> tuple[Sequence[str], dict[str, list[str]]]:
    """Overrides of every stage, and those of one, without its name."""
    everywhere: list[str] = []
    own: dict[str, list[str]] = {}
    for word in overrides:
        head, dot, rest = word.partition(".")
        if dot and head in recipe.stages:
            own.setdefault(head, []).append(rest)
        elif word.startswith(("run.", "init_from")):
            raise UserError(f"{word}: the recipe sets run.* and init_from itself; another folder is --out")
        else:
            everywhere.append(word)
    return everywhere, own
