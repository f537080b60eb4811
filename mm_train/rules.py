"""What a config has to fulfil before anything is built: every rule that needs no files and no processes. Torch-free."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from mm_train.cli import UserError

if TYPE_CHECKING:
    from mm_train.config import Config, Model

CHOICES = {
    "model.scoring_func": ("sigmoid", "softmax"),
    "train.dtype": ("float32", "bfloat16"),
    "optim.schedule": ("cosine", "linear", "constant"),
    "moe.dispatch": ("dropless", "drop_and_pad"),
    "quant.expert_group_axis": ("out", "in"),
    "parallel.engine": ("auto", "deepspeed", "plain"),
    "parallel.zero_stage": (1, 2),
    "log.wandb": ("auto", "online", "offline", "disabled"),
}
_POSITIVE = {
    "model": [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "routed_scaling_factor",
        "rms_norm_eps",
        "rope_theta",
        "max_position_embeddings",
        "initializer_range",
    ],
    "data": ["seq_len"],
    "train": ["tokens", "global_batch_tokens", "micro_batch_size"],
    "optim": ["lr", "eps"],
    "moe": ["capacity_factor"],
    "parallel": ["expert_parallel"],
    "checkpoint": ["every", "keep"],
    "log": ["every"],
}
_NOT_NEGATIVE = {
    "model": ["num_local_experts", "num_experts_per_tok", "intermediate_size", "intermediate_size_mlp"],
    "train": ["seed", "validate_every", "validation_tokens"],
    "optim": ["warmup_steps", "weight_decay", "clip_grad_norm"],
    "moe": ["bias_update_rate", "z_loss_weight"],
}
INT4_GROUP = 32  # weights that share a scale in mobilemoe-int4-g32
Rules = Iterable[tuple[bool, str]]


def validate(config: Config) -> None:
    """Check a whole training run. Raises UserError that names keys and values."""
    for section in ("data", "train", "optim", "moe", "quant", "parallel", "checkpoint", "log"):
        _check_values(section, getattr(config, section))
    validate_model(config.model)
    _refuse(_training_rules(config))
    _refuse(_run_rules(config))
    config.micro_steps(config.parallel.expert_parallel)


def validate_model(model: Model) -> None:
    """Check the shape of a network alone. Raises UserError that names keys and values."""
    _check_values("model", model)
    _refuse(_model_rules(model))


def _model_rules(model: Model) -> Rules:
    experts, top_k = model.num_local_experts, model.num_experts_per_tok
    heads, kv_heads = model.num_attention_heads, model.num_key_value_heads
    yield top_k <= experts, f"model.num_experts_per_tok ({top_k}) must not exceed num_local_experts ({experts})"
    yield (
        top_k > 0 or experts == 0,
        f"model.num_experts_per_tok is 0 with num_local_experts {experts}: a token needs an expert",
    )
    yield (
        experts > 0 or model.intermediate_size_mlp > 0,
        "model.num_local_experts is 0 (a dense network): intermediate_size_mlp must give the width of its MLP, not 0",
    )
    yield (
        experts == 0 or model.intermediate_size > 0,
        f"model.intermediate_size is 0 with num_local_experts {experts}: an expert needs a width",
    )
    yield (
        heads % kv_heads == 0,
        f"model.num_key_value_heads ({kv_heads}) must divide num_attention_heads ({heads})",
    )
    yield model.head_dim % 2 == 0, f"model.head_dim ({model.head_dim}) must be even: RoPE turns pairs"
    widths = {name: getattr(model, name) for name in ("hidden_size", "intermediate_size", "intermediate_size_mlp")}
    widths["num_attention_heads * head_dim"] = heads * model.head_dim
    for name, width in widths.items():
        yield width % INT4_GROUP == 0, f"model.{name} ({width}) must be a multiple of {INT4_GROUP}, the int4 group"
    scaling = model.rope_scaling
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        yield (
            scaling.rope_type == "llama3",
            f"model.rope_scaling.rope_type is {scaling.rope_type!r}; it must be 'llama3'",
        )
        for name in ("factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"):
            value = getattr(scaling, name)
            yield 0 < value < math.inf, f"model.rope_scaling.{name} is {value}; it must be above 0"
        yield (
            low <= high,
            f"model.rope_scaling.low_freq_factor ({low}) must not exceed high_freq_factor ({high})",
        )


def _training_rules(config: Config) -> Rules:
    model, data, train, optim = config.model, config.data, config.train, config.optim
    experts, ep = model.num_local_experts, config.parallel.expert_parallel
    yield experts % ep == 0, f"parallel.expert_parallel ({ep}) must divide model.num_local_experts ({experts})"
    yield (
        experts > 0 or ep == 1,
        f"parallel.expert_parallel is {ep}; a dense network (model.num_local_experts 0) has no experts to share out",
    )
    yield (
        model.num_experts_per_tok != 1 or not model.norm_topk_prob,
        "model.norm_topk_prob with num_experts_per_tok 1 makes every weight 1, and the router learns nothing:"
        " set model.norm_topk_prob=false",
    )
    yield (
        data.seq_len <= model.max_position_embeddings,
        f"data.seq_len ({data.seq_len}) must not exceed model.max_position_embeddings"
        f" ({model.max_position_embeddings})",
    )
    yield train.seed < 2**31, f"train.seed ({train.seed}) must be below 2^31"
    yield 0 <= optim.min_lr_ratio <= 1, f"optim.min_lr_ratio ({optim.min_lr_ratio}) must lie in 0..1"
    yield all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas} must lie in [0, 1)"
    yield (
        train.tokens >= train.global_batch_tokens,
        f"train.tokens ({train.tokens}) is less than one batch, train.global_batch_tokens"
        f" ({train.global_batch_tokens})",
    )
    yield (
        optim.warmup_steps < config.total_steps,
        f"optim.warmup_steps ({optim.warmup_steps}) must be below the stage's {config.total_steps} steps"
        f" (train.tokens / train.global_batch_tokens)",
    )


def _run_rules(config: Config) -> Rules:
    mixture = config.data.mixture
    yield bool(mixture), "data.mixture is empty: name at least one source and its weight"
    yield (
        all(0 <= w < math.inf for w in mixture.values()),
        f"data.mixture has a negative or infinite weight: {mixture}",
    )
    yield sum(mixture.values()) > 0, f"data.mixture weights sum to 0: {mixture}"
    yield bool(config.run.dir), "run.dir is empty: say where the run goes, e.g. run.dir=runs/my-run"
    yield bool(config.data.path), "data.path is empty: name a data set folder written by data_prep"


def _check_values(section: str, values: object) -> None:
    """Ranges of single values of one section."""
    for path, allowed in CHOICES.items():
        if path.startswith(section + "."):
            value = getattr(values, path.removeprefix(section + "."))
            if value not in allowed:
                raise UserError(f"{path} is {value!r}; it must be one of {', '.join(map(str, allowed))}")
    for key in _POSITIVE.get(section, ()):
        value = getattr(values, key)
        if not 0 < value < math.inf:
            raise UserError(f"{section}.{key} is {value}; it must be above 0")
    for key in _NOT_NEGATIVE.get(section, ()):
        value = getattr(values, key)
        if not 0 <= value < math.inf:
            raise UserError(f"{section}.{key} is {value}; it must not be negative")


def _refuse(rules: Rules) -> None:
    for ok, message in rules:
        if not ok:
            raise UserError(message)
