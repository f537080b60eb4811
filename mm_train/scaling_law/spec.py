"""What a sweep trains: networks of equal active parameters over expansion, granularity and shared expert. Torch-free.

A shape is a dense network whose MLP is `intermediate_size_mlp` wide (the paper's d_ff, 4 times the model width). Every
other network of that shape cuts this width into `granularity` g parts, and a token meets g of them whatever the number
of experts: half of them one shared expert and the others routed, or all of them routed. There are E g parts in all, E
being the expansion. S is E = 8, g = 8: 8 x 8 parts of d_ff / 8, 4 of them shared.
"""

import itertools
import typing
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mm_train import config
from mm_train.cli import UserError
from mm_train.inventory import active_parameters, parameters


@dataclass
class Points:
    """Runs that differ in what is listed: every combination, at every size, budget and seed of the sweep."""

    expansion: list[int] = field(default_factory=lambda: [8])  # E: all experts over what a token meets; 1: dense
    granularity: list[int] = field(default_factory=lambda: [8])  # g: into how many parts d_ff is cut
    shared: list[bool] = field(default_factory=lambda: [True])  # half of the active parts are one shared expert
    variant: str = ""  # name of the overrides below, a column of the results
    overrides: list[str] = field(default_factory=list)  # key=value, for these runs only


@dataclass
class Sweep:
    """A sweep file."""

    out: str = ""  # folder of the runs
    configs: list[str] = field(default_factory=list)  # files that every run begins with, merged left to right
    overrides: list[str] = field(default_factory=list)  # key=value after them
    shapes: dict[str, list[str]] = field(default_factory=dict)  # name -> overrides that make the dense network
    tokens: list[int] = field(default_factory=list)  # training budgets D
    seeds: list[int] = field(default_factory=lambda: [0])  # of weights and order of data
    points: list[Points] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """One training of a sweep."""

    name: str
    config: config.Config
    expansion: int
    granularity: int
    shared: bool
    variant: str

    @property
    def facts(self) -> dict[str, Any]:
        """The columns of the results that are known before training."""
        cfg = self.config
        return {
            "name": self.name,
            "active_params": sum(active_parameters(cfg.model).values()),
            "total_params": sum(parameters(cfg.model).values()),
            "tokens": cfg.total_steps * cfg.train.global_batch_tokens,
            "expansion": self.expansion,
            "granularity": self.granularity,
            "shared": int(self.shared),
            "variant": self.variant,
            "seed": cfg.train.seed,
        }


def load(path: Path) -> Sweep:
    """Read a sweep file. Raises UserError that names file, key and what would be right."""
    if not path.is_file():
        raise UserError(f"sweep file not found: {path}")
    try:
        layer = OmegaConf.load(path)
    except Exception as error:  # whatever the YAML parser raises
        raise UserError(f"{path} is not readable YAML: {error}") from None
    values: Any = OmegaConf.to_container(layer)
    config.refuse_unknown(values, Sweep, "", str(path))
    try:
        sweep = typing.cast(Sweep, OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Sweep), layer)))
    except OmegaConfBaseException as error:
        key = f" {error.full_key}:" if error.full_key else ""
        raise UserError(f"{path}:{key} {str(error.msg or error).splitlines()[0]}") from None
    for key in ("out", "configs", "shapes", "tokens", "seeds", "points"):
        if not getattr(sweep, key):
            raise UserError(f"{path}: {key} is empty; a sweep needs it (configs/sweep/ has examples)")
    return sweep


def runs(sweep: Sweep) -> list[Run]:
    """Every run of the sweep, checked. Networks that two points have in common are trained once.

    Raises UserError for values that make no network, and for two variants of one name.
    """
    found: dict[str, Run] = {}
    for points, (shape, overrides), tokens in itertools.product(sweep.points, sweep.shapes.items(), sweep.tokens):
        words = [*sweep.overrides, *overrides, *points.overrides]
        words += [f"train.tokens={tokens}", f"run.dir={sweep.out}"]
        base = config.load(sweep.configs, words)
        for expansion, granularity, shared, seed in itertools.product(
            points.expansion, points.granularity, points.shared, sweep.seeds
        ):
            if expansion == 1:  # a token meets all of it: how it is cut makes no difference
                granularity, shared = 1, False
            kind = f"e{expansion}-g{granularity}{'-shared' if shared else ''}" if expansion > 1 else "dense"
            parts = (shape, kind, points.variant, f"{short_count(tokens)}", f"seed{seed}")
            name = "-".join(part for part in parts if part)
            model = replace(base.model, name=f"{shape}-{kind}", **experts(base.model, expansion, granularity, shared))
            cfg = replace(
                base,
                model=model,
                train=replace(base.train, seed=seed),
                run=replace(base.run, dir=str(Path(sweep.out) / name)),
            )
            config.validate(cfg)
            run = Run(name, cfg, expansion, granularity, shared, points.variant)
            if found.setdefault(name, run).config != cfg:
                raise UserError(f"two runs of the sweep are called {name} and differ: give one of them a `variant`")
    return list(found.values())


def experts(dense: config.Model, expansion: int, granularity: int, shared: bool) -> dict[str, Any]:
    """Values of model.* that turn the dense network into one of `expansion` times the parts, at equal active width.

    Raises UserError when the width cannot be cut so, or when `dense` has experts already.
    """
    width = dense.intermediate_size_mlp
    if dense.num_local_experts:
        raise UserError(f"a shape of a sweep is a dense network: num_local_experts is {dense.num_local_experts}, not 0")
    if expansion < 1 or granularity < 1:
        raise UserError(f"expansion ({expansion}) and granularity ({granularity}) must be at least 1")
    if expansion == 1:
        return {}
    if width % granularity:
        raise UserError(f"granularity ({granularity}) must divide intermediate_size_mlp ({width})")
    if shared and granularity % 2:
        raise UserError(f"a shared expert is half of the active parts: granularity ({granularity}) must be even then")
    in_shared = granularity // 2 if shared else 0
    chosen = granularity - in_shared
    values: dict[str, Any] = {
        "intermediate_size": width // granularity,
        "intermediate_size_mlp": in_shared * (width // granularity),
        "num_local_experts": expansion * granularity - in_shared,
        "num_experts_per_tok": chosen,
    }
    # With one expert a token a normalised weight is 1 whatever the router says, and it would learn nothing.
    return values | ({"norm_topk_prob": False, "routed_scaling_factor": 1.0} if chosen == 1 else {})


def short_count(number: int) -> str:
    """1638400 -> "1.64M", for names."""
    for size, letter in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return str(number)


def share(items: list[Run], rank: int, world: int) -> Iterator[Run]:
    """What one task of an array of `world` runs."""
    return itertools.islice(items, rank, None, world)
