"""The question that mm_train.describe answers: a network, and how, on what and for how long it is to be trained.

Flags become values of the config, which then has to pass the rules of training (rules.py, Config.micro_steps): what
training refuses is refused here, in the same words. Torch-free.
"""

import argparse
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from mm_train import budget, config, rules
from mm_train.cli import UserError
from mm_train.costs import GPUS, Gpu, Layout

CONTEXT, TOKENS, BATCH_TOKENS = 2048, 6 * 10**12, 4_194_304  # where no stage file says otherwise: of pre-training
MFU, LEAST_MFU = 0.40, 0.001
MAX_GPUS = 1_000_000
USABLE = 0.95  # of a GPU's memory
# Words of --parallel beside gpus, and where their values go in the config.
LAYOUT_KEYS = {
    "expert_parallel": "parallel",
    "tensor_parallel": "parallel",
    "zero_stage": "parallel",
    "micro_batch_size": "train",
    "recompute": "train",
}


@dataclass(frozen=True)
class Plan:
    """What is to be estimated."""

    cfg: config.Config  # as training would take it, with what was assumed filled in
    layout: Layout
    batch_is_given: bool  # a file or an override sets it: micro-batches then have to divide it, as in training
    gpu: Gpu
    mfu: float
    assumptions: tuple[str, ...]  # in words

    @property
    def model(self) -> config.Model:
        return self.cfg.model

    def fits(self, memory_gib: float) -> bool:
        """Does so much go into the GPU, with some left for what the allocator loses in fragments?"""
        return memory_gib <= USABLE * self.gpu.memory_gib

    def on(self, gpus: int) -> "Plan":
        """The same on `gpus` GPUs, with smaller micro-batches where the batch would not divide into these.

        Raises UserError when one row a GPU is too much as well, or the layout does not divide them.
        """
        if gpus == self.layout.gpus:
            return self
        train, replicas = self.cfg.train, max(1, gpus // self.cfg.parallel.tensor_parallel)
        rows, rest = divmod(train.global_batch_tokens, self.cfg.data.seq_len * replicas)  # of each in a step
        if not self.batch_is_given:
            most = min(train.micro_batch_size, rows + (rest > 0))
        elif rest or not rows:
            most = 1
        else:
            most = next(size for size in range(min(train.micro_batch_size, rows), 0, -1) if rows % size == 0)
        cfg = replace(self.cfg, train=replace(train, micro_batch_size=most))
        return replace(self, cfg=cfg, layout=_layout(cfg, gpus, self.batch_is_given))

    def laid_out(self, expert_parallel: int, tensor_parallel: int, zero_stage: int, recompute: str) -> "Plan":
        """The same on the same GPUs in another layout. Raises UserError when it is none."""
        parallel = replace(
            self.cfg.parallel,
            expert_parallel=expert_parallel,
            tensor_parallel=tensor_parallel,
            zero_stage=zero_stage,
        )
        cfg = replace(self.cfg, parallel=parallel, train=replace(self.cfg.train, recompute=recompute))
        rules.validate_training(cfg)
        return replace(self, cfg=cfg, layout=_layout(cfg, self.layout.gpus, self.batch_is_given))


@dataclass(frozen=True)
class Given:
    """`key in given`: is the value of section.key what training would use, rather than nobody's choice?"""

    keys: frozenset[str]
    stage: bool  # a stage file is among the files

    def __contains__(self, key: str) -> bool:
        return self.stage or key in self.keys


def read_plan(args: argparse.Namespace) -> Plan:
    """The command line (see mm_train.describe) and its files. Raises UserError for what is wrong or does not fit."""
    words = _parallel(args.parallel)
    cfg = config.load_words(args.configs, check=lambda c: rules.validate_model(c.model))
    given = _given(args.configs)
    _assume(cfg, given)
    for key, section in LAYOUT_KEYS.items():
        if key in words:
            setattr(getattr(cfg, section), key, words[key])
    if args.context is not None:
        cfg.data.seq_len = round(number("--context", args.context, thousand=1024, example="2048 or 2k"))
    if args.tokens is not None:
        cfg.train.tokens = round(number("--tokens", args.tokens, thousand=1000, example="6e12 or 500B"))
        cfg.train.epochs = 0.0
    cfg = budget.from_folder(cfg)
    if not cfg.train.tokens:
        raise UserError("train.tokens is 0; it must be above 0 where train.epochs does not say how long the stage is")
    rules.validate_training(cfg)
    if given.stage:
        rules.validate_stage(cfg)
    mfu = number("--mfu", args.mfu, thousand=1000, example="0.4")
    if not LEAST_MFU <= mfu <= 1:
        raise UserError(f"--mfu is {args.mfu}; it is a share of the GPU's peak, {LEAST_MFU:g} to 1")
    gpus = words.get("gpus", cfg.parallel.expert_parallel * cfg.parallel.tensor_parallel)
    if not 1 <= gpus <= MAX_GPUS:
        raise UserError(f"--parallel gpus is {gpus}; it must be 1 to {MAX_GPUS:,}")
    if args.gpu not in GPUS:
        raise UserError(f"--gpu: unknown {args.gpu}{_near(args.gpu, GPUS)}")
    asked = {
        "data.seq_len": args.context is not None,
        "train.tokens": args.tokens is not None,
        "train.micro_batch_size": "micro_batch_size" in words,
    }
    return Plan(
        cfg=cfg,
        layout=_layout(cfg, gpus, "train.global_batch_tokens" in given),
        batch_is_given="train.global_batch_tokens" in given,
        gpu=GPUS[args.gpu],
        mfu=mfu,
        assumptions=tuple(said for key, said in _assumptions(cfg) if not asked.get(key) and key not in given),
    )


def _assume(cfg: config.Config, given: Given) -> None:
    """Put pre-training's values where the schema's defaults, meant for a small run, are nobody's choice."""
    if "train.tokens" not in given and not cfg.train.epochs:
        cfg.train.tokens = TOKENS
    if "train.global_batch_tokens" not in given:
        cfg.train.global_batch_tokens = BATCH_TOKENS
    if "train.dtype" not in given:
        cfg.train.dtype = "bfloat16"
    if "data.seq_len" not in given:
        cfg.data.seq_len = min(CONTEXT, cfg.model.max_position_embeddings)


def _assumptions(cfg: config.Config) -> Iterable[tuple[str, str]]:
    """(key, words) for what is assumed unless somebody chose it."""
    yield "train.tokens", "the paper's pre-training budget of 6 T tokens"
    yield "data.seq_len", f"rows of {cfg.data.seq_len:,} tokens"
    yield "train.global_batch_tokens", f"a global batch of {cfg.train.global_batch_tokens:,} tokens"
    yield "train.micro_batch_size", f"micro-batches of {cfg.train.micro_batch_size} rows"
    yield "train.dtype", "bfloat16 activations"
    if cfg.model.num_local_experts:
        yield "moe.dispatch", "dropless dispatch"


def _layout(cfg: config.Config, gpus: int, batch_is_given: bool) -> Layout:
    """A checked config on `gpus` GPUs. Raises UserError where they cannot share it out, as training does."""
    ep, tp, engine = cfg.parallel.expert_parallel, cfg.parallel.tensor_parallel, cfg.parallel.engine
    rules.check_world(cfg.parallel, gpus)
    share = cfg.train.micro_batch_size * cfg.data.seq_len * (gpus // tp)
    padded = cfg.moe.dispatch == "drop_and_pad" and cfg.model.num_local_experts > 0
    return Layout(
        gpus=gpus,
        expert_parallel=ep,
        zero_stage=cfg.parallel.zero_stage,
        micro_batch_size=cfg.train.micro_batch_size,
        context=cfg.data.seq_len,
        micro_steps=cfg.micro_steps(gpus) if batch_is_given else -(-cfg.train.global_batch_tokens // share),
        activation_bytes=2 if cfg.train.dtype == "bfloat16" else 4,
        capacity_factor=cfg.moe.capacity_factor if padded else None,
        quantised=cfg.quant.enabled,
        deepspeed=gpus > 1 or engine == "deepspeed",
        tensor_parallel=tp,
        recompute=cfg.train.recompute == "layer",
        muon=cfg.optim.name == "muon",
    )


def _given(words: Iterable[str]) -> Given:
    """Dotted keys that files or overrides set: a default of the schema is nobody's choice.

    A file that sets any of `train` is a stage: what it leaves out has the schema's value, as in training.
    """
    files, overrides = config.split_words(words)
    in_files = {key for path in files for key in _keys(OmegaConf.load(path))}
    whole = any(key.startswith("train.") for key in in_files)
    return Given(frozenset(in_files | _keys(OmegaConf.from_dotlist(overrides))), whole)


def _keys(layer: Any) -> set[str]:
    """section.key of a layer of configuration."""
    sections = ((name, values) for name, values in layer.items() if isinstance(values, Mapping))
    return {f"{name!s}.{key!s}" for name, values in sections for key in values}


def _parallel(words: Sequence[str]) -> dict[str, Any]:
    """--parallel's key=value words."""
    values: dict[str, Any] = {}
    known = ("gpus", *LAYOUT_KEYS)
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--parallel takes key=value, not {word!r}; config files and overrides come before it")
        if key not in known:
            raise UserError(f"--parallel: unknown key {key}{_near(key, known)}")
        values[key] = value if key == "recompute" else _whole(f"--parallel {key}", value)
    return values


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"


def _whole(name: str, value: str) -> int:
    try:
        return int(value.replace(",", ""))
    except ValueError:
        raise UserError(f"{name} is {value!r:.60}; it must be a whole number") from None


def number(name: str, value: str, thousand: int, example: str) -> float:
    """A finite number, plain or with k, M, B or T behind it: powers of `thousand`."""
    power = "kmbt".find(value[-1:].lower()) + 1 if value else 0
    try:
        number = float((value[:-1] if power else value).replace(",", "")) * thousand**power
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{name} is {value!r:.60}; it must be a number, such as {example}")
    return number
