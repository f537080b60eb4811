"""Every knob of a training run: typed dataclasses and `load(files, overrides)`. Torch-free.

    cfg = load(["configs/model/tiny.yaml", "configs/stage/tiny/pretrain.yaml"], ["optim.lr=3e-4"])

Files merge left to right, overrides (`key.sub=value`) come last, then everything is typed and checked (rules.py)
before anything is built. Model files own `model.*`, stage files everything else, launch scripts only `parallel.*` and
names. `model` uses the key names of the released checkpoints' config.json, so one vocabulary serves both.
"""

import contextlib
import difflib
import math
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mm_train.cli import UserError
from mm_train.files import write_atomic
from mm_train.rules import validate


@dataclass
class RopeScaling:
    """Llama-3 frequency scaling. MobileMoE has equal low and high factors: a hard switch at one wavelength."""

    factor: float = 16.0
    original_max_position_embeddings: int = 8192
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    rope_type: str = "llama3"


@dataclass
class Model:
    """Shape of the network (arXiv 2605.27358). Names and meanings are those of the release's config.json.

    The networks that the paper compares with are values of the same keys: `num_local_experts` 0 is a dense network,
    `intermediate_size_mlp` 0 has no shared expert, few wide experts are coarse ones, and `scoring_func` chooses the
    router. configs/model/ has one file for each.
    """

    name: str = "unnamed"
    vocab_size: int = 4096
    hidden_size: int = 128
    intermediate_size: int = 64  # hidden width of one routed expert
    intermediate_size_mlp: int = 256  # hidden width of the shared expert (0: none), or of a dense network's MLP
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    num_local_experts: int = 16  # routed experts of a layer over all ranks (the release's name for it); 0: dense
    num_experts_per_tok: int = 4
    scoring_func: str = "sigmoid"  # sigmoid (MobileMoE) | softmax, over all experts; not in the release's config.json
    routed_scaling_factor: float = 2.5
    norm_topk_prob: bool = True
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_scaling: RopeScaling | None = None
    max_position_embeddings: int = 8192
    initializer_range: float = 0.02  # ours: the paper does not state it


@dataclass
class Data:
    """What is read. A mixture is a dict source -> weight; weights are normalised."""

    path: str = ""  # data set folder written by data_prep, or its URL (s3, gs, hf, http, ...)
    mixture: dict[str, float] = field(default_factory=dict)
    validation: list[str] = field(default_factory=list)  # sources whose held-out split is scored
    seq_len: int = 512  # tokens a row
    workers: int = 2  # threads that read ahead; 0: none, the training loop reads
    ahead: int = 1  # optimizer steps whose batches they have ready
    verify: bool = True  # compare every block (16 KiB) of a shard with its checksum when first read
    max_epochs: float = 4.0  # a source that the stage repeats more often is warned about at the start
    cache_dir: str = "~/.cache/mobilemoe-train"  # of a data set behind a URL: blocks that were read are kept here
    cache_gib: float = 20.0  # so much of them, on each machine; 0: none
    on_change: str = "refuse"  # refuse | continue: what a resumed run does when its mixture or shards have changed


@dataclass
class Train:
    """How long and in what portions. Batch and budget are global and in tokens; micro-steps are derived."""

    tokens: int = 0  # whole stage; 0: `epochs` says it
    epochs: float = (
        0.0  # whole stage: so often as many rows as the mixture's sources have together; 0: `tokens` says it
    )
    global_batch_tokens: int = 8192
    micro_batch_size: int = 8  # rows a rank processes at once
    dtype: str = "float32"  # of activations; parameters, moments and the router are always float32
    recompute: str = "none"  # none | layer: keep a layer's input only, and compute the rest again in the backward pass
    seed: int = 0
    validate_every: int = 0  # steps; 0: only at the end
    validation_tokens: int = 0  # per source; 0: the whole held-out split


@dataclass
class Optim:
    """The optimizer and its schedule. What moves which part of the network is in mm_train/optim_groups.py."""

    name: str = "adamw"  # adamw | muon: Muon for the matrices of attention, MLPs and experts, AdamW for the rest
    lr: float = 4e-4
    min_lr_ratio: float = 0.1  # last learning rate over the peak
    schedule: str = "cosine"  # cosine | linear | constant | wsd, after a linear warm-up
    warmup_steps: int = 100
    decay_fraction: float = 0.2  # wsd (warm-up, stable, decay): of the steps, those at the end in which the rate falls
    decay_steps: int = 0  # wsd: the same as a number of steps; 0: decay_fraction says it
    decay_shape: str = "1-sqrt"  # wsd: 1-sqrt | linear
    betas: tuple[float, float] = (0.9, 0.95)  # AdamW's
    eps: float = 1e-8
    weight_decay: float = 0.1
    no_decay: list[str] = field(default_factory=lambda: ["norms"])  # parts of the network without weight decay
    momentum: float = 0.95  # Muon's
    muon_adjust_lr: str = "match_rms_adamw"  # match_rms_adamw: updates as large as AdamW's | original: Jordan's scale
    muon_lr_ratio: float = 1.0  # learning rate of Muon's matrices over lr
    clip_grad_norm: float = 1.0  # 0: off

    def decay_from(self, total_steps: int) -> int:
        """First step (0-based) of wsd's decay: what comes before does not depend on how long the stage is."""
        return total_steps - (self.decay_steps or math.ceil(self.decay_fraction * total_steps))


@dataclass
class Moe:
    """Routing in training. Evaluation is always dropless."""

    dispatch: str = "dropless"  # dropless | drop_and_pad
    capacity_factor: float = 1.5  # drop_and_pad: rows per expert = factor * tokens * top_k / experts
    bias_update_rate: float = 1e-3  # auxiliary-loss-free balancing
    z_loss_weight: float = 1e-4


@dataclass
class Quant:
    """Quantisation-aware training: fake-quantised int4-g32 weights, int8 dynamic activations; router float32."""

    enabled: bool = False
    expert_group_axis: str = "out"  # out: the release format; in: what device runtimes want
    activations_int8: bool = True


@dataclass
class Parallel:
    """Layout over processes: world = tensor_parallel * data parallel, data parallel = expert_parallel * replicas."""

    engine: str = "auto"  # auto: deepspeed when there is more than one process | deepspeed | plain
    expert_parallel: int = 1
    tensor_parallel: int = 1  # attention, shared expert and vocabulary; routed experts and router are replicated
    zero_stage: int = 1  # 0: everything on every rank | 1: moments and master weights shared out | 2: gradients too


@dataclass
class Checkpoint:
    every: int = 100  # steps
    keep: int = 2  # newest ones kept
    keep_every: int = 0  # steps: those at multiples of it are kept for good; 0: none
    asynchronous: bool = True  # training goes on while a checkpoint is written, from a copy in memory


@dataclass
class Evaluate:
    """Benchmarks beside training: python -m eval.run on a checkpoint, in a process of its own on rank 0's machine."""

    every: int = 0  # steps, a multiple of checkpoint.every; 0: never
    tasks: str = "hellaswag,piqa,arc_easy"  # as eval.run takes them: suites and benchmarks, with commas
    limit: int = 100  # items of each benchmark; 0: all
    data: str = "data/eval"  # folder of python -m eval.prepare_data
    device: str = "cpu"  # cpu | cuda: rank 0's own GPU, which then has to have room for the model twice


@dataclass
class Faults:
    """What to do when training goes wrong."""

    max_skipped_steps: int = 10  # in a row, for a loss or gradient that is not finite; the next one ends the run
    spike_factor: float = 0.0  # a loss above the recent median by this many deviations is a spike; 0: not looked for
    spike_action: str = "warn"  # warn | rollback: go back to the last checkpoint and leave out the data since | stop
    max_rollbacks: int = 3  # then the run ends
    hang_seconds: float = 1800  # without any progress a rank dumps its stacks and exits; 0: never


@dataclass
class Profile:
    steps: str = ""  # e.g. 10-12: these optimizer steps (from 1) are traced by torch's profiler; empty: none


@dataclass
class Log:
    every: int = 10  # steps
    wandb: str = "auto"  # auto: online when logged in, else offline | online | offline | disabled
    project: str = "mobilemoe-train"


@dataclass
class Run:
    dir: str = ""
    stage: str = "pretrain"


@dataclass
class Config:
    """One training run. Resuming is automatic.

    A new run may begin with the weights of another (`init_from`: a new stage), or with everything that a checkpoint of
    another holds (`resume_from`: the same stage, say with more tokens).
    """

    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    train: Train = field(default_factory=Train)
    optim: Optim = field(default_factory=Optim)
    moe: Moe = field(default_factory=Moe)
    quant: Quant = field(default_factory=Quant)
    parallel: Parallel = field(default_factory=Parallel)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    evaluate: Evaluate = field(default_factory=Evaluate)
    faults: Faults = field(default_factory=Faults)
    profile: Profile = field(default_factory=Profile)
    log: Log = field(default_factory=Log)
    run: Run = field(default_factory=Run)
    init_from: str | None = None  # run, checkpoint or release folder
    resume_from: str | None = None  # run or checkpoint folder; once run.dir has checkpoints of its own, those count

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the stage: the token budget over the global batch, rounded up.

        0 as long as the budget is in epochs: mm_train.budget makes tokens of them.
        """
        return -(-self.train.tokens // self.train.global_batch_tokens)

    @property
    def decay_from(self) -> int | None:
        """Steps before the decay of a wsd schedule; None for other schedules."""
        return self.optim.decay_from(self.total_steps) if self.optim.schedule == "wsd" else None

    def micro_steps(self, world: int) -> int:
        """Micro-batches that each of `world` ranks runs per optimizer step.

        Ranks of a tensor-parallel group share their micro-batches. Raises UserError where the batch does not divide.
        """
        replicas = max(1, world // self.parallel.tensor_parallel)
        micro_tokens = self.train.micro_batch_size * self.data.seq_len
        if self.train.global_batch_tokens % (micro_tokens * replicas):
            shared = (
                f" / tensor_parallel ({self.parallel.tensor_parallel})" if self.parallel.tensor_parallel > 1 else ""
            )
            raise UserError(
                f"train.global_batch_tokens ({self.train.global_batch_tokens}) must be a multiple of"
                f" train.micro_batch_size ({self.train.micro_batch_size}) x data.seq_len ({self.data.seq_len})"
                f" x processes ({world}){shared} = {micro_tokens * replicas}"
            )
        return self.train.global_batch_tokens // (micro_tokens * replicas)


def load(
    files: Sequence[str | Path], overrides: Iterable[str] = (), check: Callable[[Config], None] = validate
) -> Config:
    """Merge YAML `files` left to right, then `key.sub=value` overrides; return a typed Config that passed `check`.

    Raises UserError for a missing or unreadable file, an unknown key (with the nearest known one), a value of the
    wrong type, and every violated rule of `check`.
    """
    merged = OmegaConf.structured(Config)
    for path in map(Path, files):
        if not path.is_file():
            raise UserError(f"config file not found: {path}")
        try:
            layer = OmegaConf.load(path)
        except Exception as error:  # OmegaConf hands on whatever its YAML parser raises
            raise UserError(f"{path} is not readable YAML: {error}") from None
        merged = _merge(merged, layer, str(path), replace_mixture=True)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form key.sub=value")
        try:
            layer = OmegaConf.from_dotlist([override])
        except Exception as error:
            raise UserError(f"override {override!r} is not readable: {str(error).splitlines()[0]}") from None
        merged = _merge(merged, layer, f"override {override!r}")
    config = _typed(merged, "config")
    check(config)
    return config


def load_words(words: Iterable[str], check: Callable[[Config], None] = validate) -> Config:
    """`load` for the words of a command line: files, and overrides wherever they stand among them."""
    return load(*split_words(words), check)


def split_words(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(files, overrides): a word with "=" in it is an override."""
    parts: tuple[list[str], list[str]] = ([], [])
    for word in words:
        parts["=" in word].append(word)
    return parts


def from_dict(values: Mapping[str, Any], origin: str) -> Config:
    """Config from plain values, as in a checkpoint; `origin` names the source in errors."""
    return _typed(_merge(OmegaConf.structured(Config), dict(values), origin), origin)


def save(config: Config, path: Path) -> None:
    """Write the resolved config as YAML that `load([path])` reads back equal. Raises UserError where it cannot."""
    text = OmegaConf.to_yaml(OmegaConf.create(asdict(config)))
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


def model_difference(here: Model, there: Model) -> str | None:
    """The first key in which two networks differ, in words; None when the weights of one mean the same in the other."""
    free = {"name", "initializer_range", "max_position_embeddings"}
    for f in fields(Model):
        ours, theirs = getattr(here, f.name), getattr(there, f.name)
        if f.name not in free and ours != theirs:
            return f"model.{f.name} is {theirs} there and {ours} here"
    return None


def _merge(base, layer, origin: str, replace_mixture: bool = False):
    plain: Any = OmegaConf.to_container(layer) if OmegaConf.is_config(layer) else layer
    refuse_unknown(plain, Config, "", origin)
    # A file's mixture stands for itself: sources of an earlier file must not leak into it.
    if replace_mixture and "mixture" in (plain.get("data") or {}):
        base.data.mixture = {}
    with _omegaconf_errors(origin):
        return OmegaConf.merge(base, layer)


def _typed(merged, origin: str) -> Config:
    with _omegaconf_errors(origin):
        return typing.cast(Config, OmegaConf.to_object(merged))


@contextlib.contextmanager
def _omegaconf_errors(origin: str) -> Iterator[None]:
    """A wrong type or an unresolved interpolation, as one line that names the key."""
    try:
        yield
    except OmegaConfBaseException as error:
        key = f" {error.full_key}:" if error.full_key else ""
        raise UserError(f"{origin}:{key} {str(error.msg or error).splitlines()[0]}") from None
    except OverflowError as error:
        raise UserError(f"{origin}: a number is too large: {error}") from None


def refuse_unknown(values: Any, cls: type, prefix: str, origin: str) -> None:
    """Raise UserError for the first key of `values` that dataclass `cls` (or one inside it) does not have.

    `prefix` is the dotted path down to `values` ("" at the top), `origin` the file or override they come from.
    """
    if not isinstance(values, Mapping):
        raise UserError(f"{origin}: {prefix.rstrip('.') or 'the file'} must be a mapping of keys, not {values!r:.80}")
    known = typing.get_type_hints(cls)
    for key, value in values.items():
        if key not in known:
            near = difflib.get_close_matches(str(key), known, n=1)
            hint = f"did you mean {prefix}{near[0]}?" if near else f"known: {', '.join(known)}"
            raise UserError(f"{origin}: unknown key {prefix}{key} ({hint})")
        inner = next((t for t in (known[key], *typing.get_args(known[key])) if is_dataclass(t)), None)
        if inner is None or value is None:
            continue
        if typing.get_origin(known[key]) is list:
            if not isinstance(value, list):
                raise UserError(f"{origin}: {prefix}{key} must be a list, not {value!r:.80}")
            for index, item in enumerate(value):
                refuse_unknown(item, typing.cast(type, inner), f"{prefix}{key}[{index}].", origin)
        elif typing.get_origin(known[key]) is dict:
            if not isinstance(value, Mapping):
                raise UserError(f"{origin}: {prefix}{key} must be a mapping of names, not {value!r:.80}")
            for name, item in value.items():
                refuse_unknown(item, typing.cast(type, inner), f"{prefix}{key}.{name}.", origin)
        else:
            refuse_unknown(value, typing.cast(type, inner), f"{prefix}{key}.", origin)
