"""What a config has to fulfil before anything is built: every rule that needs no files and no processes. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mm_train.cli import UserError

if TYPE_CHECKING:
    from mm_train.config import Config, Model, Parallel

CHOICES = {
    "model.scoring_func": ("sigmoid", "softmax"),
    "train.dtype": ("float32", "bfloat16"),
    "train.recompute": ("none", "layer"),
    "data.on_change": ("refuse", "continue"),
    "optim.name": ("adamw", "muon"),
    "optim.schedule": ("cosine", "linear", "constant", "wsd"),
    "optim.decay_shape": ("1-sqrt", "linear"),
    "optim.muon_adjust_lr": ("match_rms_adamw", "original"),
    "moe.dispatch": ("dropless", "drop_and_pad"),
    "quant.expert_group_axis": ("out", "in"),
    "parallel.engine": ("auto", "deepspeed", "plain"),
    "parallel.zero_stage": (0, 1, 2),
    "evaluate.device": ("cpu", "cuda"),
    "faults.spike_action": ("warn", "rollback", "stop"),
    "log.wandb": ("auto", "online", "offline", "disabled"),
}


@dataclass(frozen=True)
class Range:
    """Allowed values of one key, `high` among them."""

    low: float
    high: float
    above: bool = False  # `low` itself is too small

    def allows(self, value: float) -> bool:
        """Is the value, of any size, inside? NaN never is."""
        return (self.low < value if self.above else self.low <= value) and value <= self.high

    def __str__(self) -> str:
        low, high = (f"{end:,}" if isinstance(end, int) else f"{end:g}" for end in (self.low, self.high))
        return f"{'above' if self.above else 'at least'} {low} and at most {high}"


WIDTH, COUNT = (
    2**24,
    10**12,
)  # more than anyone trains, and little enough for arithmetic in float64 and loops over layers
# A range ends where float32 would make 0, infinity or NaN of the value, or where it can only be a slip of the keyboard.
RANGES = {
    "model.vocab_size": Range(0, WIDTH, above=True),
    "model.hidden_size": Range(0, WIDTH, above=True),
    "model.intermediate_size": Range(0, WIDTH),
    "model.intermediate_size_mlp": Range(0, WIDTH),
    "model.num_hidden_layers": Range(0, 1024, above=True),
    "model.num_attention_heads": Range(0, WIDTH, above=True),
    "model.num_key_value_heads": Range(0, WIDTH, above=True),
    "model.head_dim": Range(0, WIDTH, above=True),
    "model.num_local_experts": Range(0, 65_536),
    "model.num_experts_per_tok": Range(0, 65_536),
    "model.routed_scaling_factor": Range(0, 1e4, above=True),
    "model.rms_norm_eps": Range(1e-12, 0.1),
    "model.rope_theta": Range(1, 1e12),
    "model.max_position_embeddings": Range(0, WIDTH, above=True),
    "model.initializer_range": Range(0, 10, above=True),
    "model.rope_scaling.factor": Range(0.001, 1e6, above=True),
    "model.rope_scaling.original_max_position_embeddings": Range(0, WIDTH, above=True),
    "model.rope_scaling.low_freq_factor": Range(0.001, 1e6, above=True),
    "model.rope_scaling.high_freq_factor": Range(0.001, 1e6, above=True),
    "data.seq_len": Range(0, WIDTH, above=True),
    "data.workers": Range(0, 256),
    "data.ahead": Range(0, 1024),
    "data.cache_gib": Range(0, 1e6),
    "data.max_epochs": Range(0, COUNT, above=True),
    "train.tokens": Range(0, 10**18),
    "train.epochs": Range(0, 10_000),
    "train.global_batch_tokens": Range(0, COUNT, above=True),
    "train.micro_batch_size": Range(0, 65_536, above=True),
    "train.seed": Range(0, COUNT),
    "train.validate_every": Range(0, COUNT),
    "train.validation_tokens": Range(0, COUNT),
    "optim.lr": Range(0, 10, above=True),
    "optim.min_lr_ratio": Range(0, 1),
    "optim.warmup_steps": Range(0, COUNT),
    "optim.decay_fraction": Range(0, 1),
    "optim.decay_steps": Range(0, COUNT),
    "optim.eps": Range(1e-30, 1),
    "optim.weight_decay": Range(0, 10),
    "optim.momentum": Range(0, 0.9999),
    "optim.muon_lr_ratio": Range(0, 1e4, above=True),
    "optim.clip_grad_norm": Range(0, 1e6),
    "moe.capacity_factor": Range(0, 1000, above=True),
    "moe.bias_update_rate": Range(0, 10),
    "moe.z_loss_weight": Range(0, 1000),
    "parallel.expert_parallel": Range(0, 65_536, above=True),
    "parallel.tensor_parallel": Range(0, 1024, above=True),
    "checkpoint.every": Range(0, COUNT, above=True),
    "checkpoint.keep": Range(0, COUNT, above=True),
    "checkpoint.keep_every": Range(0, COUNT),
    "evaluate.every": Range(0, COUNT),
    "evaluate.limit": Range(0, COUNT),
    "faults.max_skipped_steps": Range(0, COUNT),
    "faults.spike_factor": Range(0, 1e6),
    "faults.max_rollbacks": Range(0, COUNT),
    "faults.hang_seconds": Range(0, 1e9),
    "log.every": Range(0, COUNT, above=True),
}
PARTS = ("embedding", "attention", "router", "routed experts", "shared expert", "mlp", "norms")  # of a network
MAX_WEIGHT = 1e9  # of a source in the mixture
INT4_GROUP = 32  # weights that share a scale in mobilemoe-int4-g32
Rules = Iterable[tuple[bool, str]]


def validate(config: Config) -> None:
    """Check a whole training run. Raises UserError that names keys and values."""
    validate_training(config)
    validate_stage(config)
    _refuse(_run_rules(config))
    config.micro_steps(config.parallel.expert_parallel * config.parallel.tensor_parallel)


def validate_training(config: Config) -> None:
    """Check what holds for any training of a network, whatever its budget: every value, and how they fit together.

    Raises UserError that names keys and values.
    """
    for section in ("data", "train", "optim", "moe", "quant", "parallel", "checkpoint", "evaluate", "faults", "log"):
        check_values(section, getattr(config, section))
    validate_model(config.model)
    _refuse(_training_rules(config))


def validate_stage(config: Config) -> None:
    """Check that budget, batch and schedule fit together. Raises UserError that names keys and values."""
    _refuse(_stage_rules(config))


def validate_model(model: Model, int4: bool = True) -> None:
    """Check the shape of a network alone; `int4`: whether it has to fit into the int4 format, as all that is trained.

    Raises UserError that names keys and values.
    """
    check_values("model", model)
    if model.rope_scaling is not None:
        check_values("model.rope_scaling", model.rope_scaling)
    _refuse(_model_rules(model))
    if int4:
        _refuse(_int4_rules(model))


def check_world(parallel: Parallel, world: int) -> None:
    """Raise UserError when `world` processes cannot take the layout."""
    tp, ep = parallel.tensor_parallel, parallel.expert_parallel
    if world > 1 and parallel.engine == "plain":
        raise UserError(f"parallel.engine=plain runs on one process; there are {world}: use deepspeed or auto")
    if world % tp:
        raise UserError(f"parallel.tensor_parallel ({tp}) must divide the number of processes ({world})")
    if world // tp % ep:
        shared = f" / tensor_parallel ({tp})" if tp > 1 else ""
        raise UserError(f"parallel.expert_parallel ({ep}) must divide the number of processes ({world}){shared}")


def check_values(section: str, values: object) -> None:
    """Check each value of one section by itself. Raises UserError that names key, value and what is allowed."""
    for path in (*CHOICES, *RANGES):
        parent, _, key = path.rpartition(".")
        if parent != section:
            continue
        value = getattr(values, key)
        if path in CHOICES and value not in CHOICES[path]:
            raise UserError(f"{path} is {_shown(value)}; it must be one of {', '.join(map(str, CHOICES[path]))}")
        if path in RANGES and not RANGES[path].allows(value):
            raise UserError(f"{path} is {_shown(value)}; it must be {RANGES[path]}")


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
    scaling = model.rope_scaling
    if scaling is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        yield (
            scaling.rope_type == "llama3",
            f"model.rope_scaling.rope_type is {scaling.rope_type!r}; it must be 'llama3'",
        )
        yield (
            low <= high,
            f"model.rope_scaling.low_freq_factor ({low}) must not exceed high_freq_factor ({high})",
        )


def _int4_rules(model: Model) -> Rules:
    widths = {name: getattr(model, name) for name in ("hidden_size", "intermediate_size", "intermediate_size_mlp")}
    widths["num_attention_heads * head_dim"] = model.num_attention_heads * model.head_dim
    for name, width in widths.items():
        yield width % INT4_GROUP == 0, f"model.{name} ({width}) must be a multiple of {INT4_GROUP}, the int4 group"


def _training_rules(config: Config) -> Rules:
    model, data, train, optim = config.model, config.data, config.train, config.optim
    experts, ep = model.num_local_experts, config.parallel.expert_parallel
    yield experts % ep == 0, f"parallel.expert_parallel ({ep}) must divide model.num_local_experts ({experts})"
    yield (
        experts > 0 or ep == 1,
        f"parallel.expert_parallel is {ep}; a dense network (model.num_local_experts 0) has no experts to share out",
    )
    yield from _tensor_parallel_rules(config)
    yield (
        config.faults.spike_factor > 0 or config.faults.spike_action == "warn",
        f"faults.spike_action is {config.faults.spike_action} but spikes are not looked for: set faults.spike_factor,"
        " e.g. 8",
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
    yield all(0 <= b < 1 for b in optim.betas), f"optim.betas {optim.betas} must lie in [0, 1)"
    unknown = [part for part in optim.no_decay if part not in PARTS]
    yield not unknown, f"optim.no_decay names {', '.join(unknown)}; parts of a network are {', '.join(PARTS)}"
    yield (
        all(0 <= weight <= MAX_WEIGHT for weight in data.mixture.values()),
        f"data.mixture has a negative or infinite weight, or one above {MAX_WEIGHT:g}: {data.mixture}",
    )


def _tensor_parallel_rules(config: Config) -> Rules:
    tp = config.parallel.tensor_parallel
    for key in ("num_attention_heads", "num_key_value_heads", "vocab_size", "intermediate_size_mlp"):
        value = getattr(config.model, key)
        yield value % tp == 0, f"parallel.tensor_parallel ({tp}) must divide model.{key} ({value})"
    yield (
        tp == 1 or not config.quant.enabled,
        f"parallel.tensor_parallel is {tp} with quant.enabled: int8 activations are scaled by whole rows, which a rank"
        " does not have; use parallel.expert_parallel and more processes instead",
    )
    yield (
        tp == 1 or config.parallel.engine != "plain",
        f"parallel.tensor_parallel is {tp} with parallel.engine=plain, one process: use deepspeed or auto",
    )


def _stage_rules(config: Config) -> Rules:
    train, optim = config.train, config.optim
    yield (
        not (train.tokens and train.epochs),
        f"train.tokens ({train.tokens}) and train.epochs ({train.epochs:g}) are both set: set one of them to 0",
    )
    yield (
        bool(train.tokens or train.epochs),
        "how long the stage is, is not said: set train.tokens, or train.epochs of its data",
    )
    if train.epochs:  # mm_train.budget makes tokens of them, and asks again
        return
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
    if optim.schedule == "wsd":
        start, steps = optim.decay_from(config.total_steps), config.total_steps
        key = "decay_steps" if optim.decay_steps else "decay_fraction"
        yield (
            optim.warmup_steps <= start,
            f"optim.{key} ({getattr(optim, key)}) and optim.warmup_steps ({optim.warmup_steps}) do not fit into the"
            f" stage's {steps} steps: the decay would begin at step {start}, before the warm-up has ended",
        )


def _run_rules(config: Config) -> Rules:
    mixture = config.data.mixture
    yield bool(mixture), "data.mixture is empty: name at least one source and its weight"
    yield sum(mixture.values()) > 0, f"data.mixture weights sum to 0: {mixture}"
    yield bool(config.run.dir), "run.dir is empty: say where the run goes, e.g. run.dir=runs/my-run"
    yield (
        not (config.init_from and config.resume_from),
        f"init_from ({config.init_from}: a new stage) and resume_from ({config.resume_from}: the same stage) exclude"
        " each other",
    )
    yield bool(config.data.path), "data.path is empty: name a data set folder written by data_prep"
    every, keep_every = config.checkpoint.every, config.checkpoint.keep_every
    yield (
        keep_every % every == 0,
        f"checkpoint.keep_every ({keep_every}) must be a multiple of checkpoint.every ({every}), or 0",
    )
    every_evaluation = config.evaluate.every
    yield (
        every_evaluation % every == 0,
        f"evaluate.every ({every_evaluation}) must be a multiple of checkpoint.every ({every}), or 0",
    )
    steps, budget = config.profile.steps, config.total_steps or COUNT
    first, dash, last = steps.partition("-")
    last = last if dash else first
    yield (
        not steps or (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last) <= budget),
        f"profile.steps is {steps!r}; it must be a step or a range of steps, counted from 1 and up to"
        f" {budget}, e.g. 10-12",
    )


def _refuse(rules: Rules) -> None:
    for ok, message in rules:
        if not ok:
            raise UserError(message)


def _shown(value: object) -> str:
    """A value in a message. Python refuses to print whole numbers of more than 4300 digits."""
    if isinstance(value, int) and abs(value) > 10**30:
        return f"a whole number of {value.bit_length():,} bits"
    return repr(value)
