"""The question that mm_train.describe answers: a network, and how, on what and for how long it is to be trained.

Read from config files and the command line, and checked. What training checks as well says the same here. Torch-free.
"""

import argparse
import difflib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf

from mm_train import config
from mm_train.cli import UserError
from mm_train.costs import GPUS, Gpu, Layout
from mm_train.rules import CHOICES, validate_model

CONTEXT, TOKENS, BATCH_TOKENS = 2048, 6e12, 4_194_304  # where no stage file says otherwise: those of pre-training
MFU = 0.40
PARALLEL_KEYS = ("gpus", "expert_parallel", "zero_stage", "micro_batch_size")


@dataclass(frozen=True)
class Plan:
    """What is to be estimated."""

    model: config.Model
    layout: Layout
    engine: str  # parallel.engine
    batch_tokens: int  # global batch
    batch_is_given: bool  # a file or an override sets it: micro-batches then have to divide it, as in training
    tokens: float  # budget
    gpu: Gpu
    mfu: float
    assumptions: tuple[str, ...]  # in words

    def on(self, gpus: int) -> "Plan":
        """The same on `gpus` GPUs. Raises UserError when layout or batch cannot be shared out over them."""
        layout, experts, ep = self.layout, self.model.num_local_experts, self.layout.expert_parallel
        if ep > 1 and not experts:
            raise UserError(
                f"expert_parallel is {ep}; a dense network (model.num_local_experts 0) has no experts to share out"
            )
        if experts % ep:
            raise UserError(f"expert_parallel ({ep}) must divide model.num_local_experts ({experts})")
        if gpus % ep:
            raise UserError(f"expert_parallel ({ep}) must divide gpus ({gpus:,})")
        if gpus > 1 and self.engine == "plain":
            raise UserError(f"parallel.engine=plain runs on one process; gpus is {gpus}: use deepspeed or auto")
        share = layout.tokens * gpus
        if self.batch_is_given and self.batch_tokens % share:
            raise UserError(
                f"train.global_batch_tokens ({self.batch_tokens:,}) must be a multiple of micro_batch_size"
                f" ({layout.micro_batch_size}) x context ({layout.context:,}) x gpus ({gpus:,}) = {share:,}"
            )
        micro_steps = -(-self.batch_tokens // share)
        deepspeed = gpus > 1 or self.engine == "deepspeed"
        return replace(self, layout=replace(layout, gpus=gpus, micro_steps=micro_steps, deepspeed=deepspeed))

    def scaled(self, gpus: int) -> "Plan":
        """The same on `gpus` GPUs, with smaller micro-batches where the batch would not divide into these.

        Raises UserError when one row a GPU is too much as well.
        """
        if gpus == self.layout.gpus:
            return self
        rows = self.layout.micro_batch_size
        while rows > 1 and self.batch_tokens % (rows * self.layout.context * gpus):
            rows -= 1
        return replace(self, layout=replace(self.layout, micro_batch_size=rows)).on(gpus)


@dataclass(frozen=True)
class Given:
    """`key in given`: is the value of section.key what training would use, rather than nobody's choice?"""

    keys: frozenset[str]
    stage: bool  # a stage file is among the files

    def __contains__(self, key: str) -> bool:
        return self.stage or key in self.keys


def read_plan(args: argparse.Namespace) -> Plan:
    """The command line (see mm_train.describe) and its files. Raises UserError for what is wrong or does not fit."""
    files = [a for a in args.configs if "=" not in a]
    overrides = [a for a in args.configs if "=" in a]
    cfg = config.load(files, overrides, check=lambda c: validate_model(c.model))
    given = _given(files, overrides)
    layout = _layout(args, cfg, given)
    tokens = float(cfg.train.tokens) if "train.tokens" in given else TOKENS
    if args.tokens is not None:
        tokens = _number("--tokens", args.tokens)
    batch = cfg.train.global_batch_tokens if "train.global_batch_tokens" in given else BATCH_TOKENS
    mfu = _number("--mfu", args.mfu)
    for name, value in (("the token budget", tokens), ("train.global_batch_tokens", batch)):
        if not 0 < value < math.inf:
            raise UserError(f"{name} is {value:g}; it must be above 0")
    if not 0 < mfu <= 1:
        raise UserError(f"--mfu is {args.mfu}; it is a share of the GPU's peak, above 0 and at most 1")
    if args.gpu not in GPUS:
        raise UserError(f"--gpu: unknown {args.gpu}{_near(args.gpu, GPUS)}")
    if cfg.parallel.engine not in CHOICES["parallel.engine"]:
        raise UserError(f"parallel.engine is {cfg.parallel.engine!r}; it must be auto, deepspeed or plain")
    words = _parallel(args.parallel)
    assumed = {
        "train.tokens": "the paper's pre-training budget of 6 T tokens" if args.tokens is None else "",
        "data.seq_len": f"rows of {layout.context:,} tokens" if args.context is None else "",
        "train.global_batch_tokens": f"a global batch of {batch:,} tokens",
        "train.micro_batch_size": f"micro-batches of {layout.micro_batch_size} rows"
        if "micro_batch_size" not in words
        else "",
        "train.dtype": "bfloat16 activations",
        "moe.dispatch": "dropless dispatch" if cfg.model.num_local_experts else "",
    }
    plan = Plan(
        model=cfg.model,
        layout=layout,
        engine=cfg.parallel.engine,
        batch_tokens=batch,
        batch_is_given="train.global_batch_tokens" in given,
        tokens=tokens,
        gpu=GPUS[args.gpu],
        mfu=mfu,
        assumptions=tuple(words for key, words in assumed.items() if words and key not in given),
    )
    return plan.on(words.get("gpus", layout.expert_parallel))


def _layout(args: argparse.Namespace, cfg: config.Config, given: Given) -> Layout:
    """How to train; on how many GPUs is decided later."""
    words = _parallel(args.parallel)
    sizes = {
        "gpus": words.get("gpus", 1),
        "expert_parallel": words.get("expert_parallel", cfg.parallel.expert_parallel),
        "micro_batch_size": words.get("micro_batch_size", cfg.train.micro_batch_size),
    }
    for key, size in sizes.items():
        if size < 1:
            raise UserError(f"{key} is {size}; it must be at least 1")
    zero_stage = words.get("zero_stage", cfg.parallel.zero_stage)
    if zero_stage not in (0, 1, 2):
        raise UserError(f"zero_stage is {zero_stage}; it must be 0, 1 or 2")
    for key, value in (("train.dtype", cfg.train.dtype), ("moe.dispatch", cfg.moe.dispatch)):
        if value not in CHOICES[key]:
            raise UserError(f"{key} is {value!r}; it must be one of {', '.join(map(str, CHOICES[key]))}")
    if not 0 < cfg.moe.capacity_factor < math.inf:
        raise UserError(f"moe.capacity_factor is {cfg.moe.capacity_factor}; it must be above 0")
    longest = cfg.model.max_position_embeddings
    context = cfg.data.seq_len if "data.seq_len" in given else min(CONTEXT, longest)
    if args.context is not None:
        context = _whole("--context", args.context)
    if not 0 < context <= longest:
        raise UserError(f"the context ({context} tokens) must lie in 1..model.max_position_embeddings ({longest})")
    padded = cfg.moe.dispatch == "drop_and_pad" and cfg.model.num_local_experts > 0
    narrow = cfg.train.dtype == "bfloat16" or "train.dtype" not in given
    return Layout(
        expert_parallel=sizes["expert_parallel"],
        zero_stage=zero_stage,
        micro_batch_size=sizes["micro_batch_size"],
        context=context,
        activation_bytes=2 if narrow else 4,
        capacity_factor=cfg.moe.capacity_factor if padded else None,
        quantised=cfg.quant.enabled,
    )


def _given(files: Iterable[str], overrides: Sequence[str]) -> Given:
    """Dotted keys that files or overrides set: a default of the schema is nobody's choice.

    A file that sets any of `train` is a stage: what it leaves out has the schema's value, as in training.
    """
    in_files = {key for path in files for key in _keys(OmegaConf.load(path))}
    whole = any(key.startswith("train.") for key in in_files)
    return Given(frozenset(in_files | _keys(OmegaConf.from_dotlist(list(overrides)))), whole)


def _keys(layer: Any) -> set[str]:
    """section.key of a layer of configuration."""
    sections = ((name, values) for name, values in layer.items() if isinstance(values, Mapping))
    return {f"{name!s}.{key!s}" for name, values in sections for key in values}


def _parallel(words: Sequence[str]) -> dict[str, int]:
    """--parallel's key=value words."""
    values = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise UserError(f"--parallel takes key=value, not {word!r}; config files and overrides come before it")
        if key not in PARALLEL_KEYS:
            raise UserError(f"--parallel: unknown key {key}{_near(key, PARALLEL_KEYS)}")
        values[key] = _whole(f"--parallel {key}", value)
    return values


def _near(word: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, known, n=1)
    return f" (did you mean {near[0]}?)" if near else f" (known: {', '.join(known)})"


def _whole(name: str, value: str) -> int:
    try:
        return int(value.replace(",", ""))
    except ValueError:
        raise UserError(f"{name} is {value!r}; it must be a whole number") from None


def _number(name: str, value: str) -> float:
    """A number, plain or with k, M, B or T behind it."""
    factor = {"k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}.get(value[-1:].lower(), 1.0)
    digits = value[:-1] if factor > 1 else value
    try:
        return float(digits.replace(",", "")) * factor
    except ValueError:
        raise UserError(f"{name} is {value!r}; it must be a number, such as 0.4, 6e12 or 500B") from None
