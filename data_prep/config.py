"""The schema of a data configuration: typed dataclasses and `load(file, overrides)`. Torch-free."""

import dataclasses
import re
import typing
from collections.abc import Iterable
from pathlib import Path

from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mm_train.cli import UserError
from mm_train.config import refuse_unknown

KINDS = ("stdlib_code", "machine_docs", "docstring_chat", "files", "hub")
DOMAINS = ("web", "code", "math", "knowledge", "science", "chat", "safety", "tools", "reasoning")
TOKENIZER_KINDS = ("train_bpe", "llama3", "folder")
LAYOUTS = ("stream", "packed")
NORMALISE = ("newlines", "control", "nfc", "trim")
DEDUP = ("none", "exact", "minhash")
FILTERS = ("gopher_quality", "gopher_repetition", "c4_quality", "fineweb_quality", "language")
DOC_PARTS = ("topics", "docstrings", "packages", "system")


@dataclasses.dataclass
class TokenizerConfig:
    """Which tokenizer encodes every source."""

    kind: str = MISSING  # train_bpe: learn one from the training text | llama3 | folder: use the one at `path`
    vocab_size: int = 4096  # train_bpe: tokens, control tokens included
    sample_bytes: int = 100_000_000  # train_bpe: learn from at most this much text of each source
    path: str | None = None  # folder: a folder with tokenizer.json


@dataclasses.dataclass
class SourceConfig:
    """One source of documents. It becomes the folder OUT/NAME."""

    kind: str = MISSING  # stdlib_code | machine_docs | docstring_chat | files | hub
    licence: str = MISSING  # of the documents, as an SPDX name where there is one
    domain: str = MISSING  # web | code | math | knowledge | science | chat | safety | tools | reasoning
    weight: float = 1.0  # in the mixture that the data set is made for; any unit

    # Where it is
    paths: list[str] = dataclasses.field(default_factory=list)  # files: globs; endings: data_prep/formats.py
    path: str | None = None  # hub: OWNER/NAME, or a folder in the layout of the hub
    name: str | None = None  # hub: configuration
    split: str = "train"  # hub
    revision: str | None = None  # hub: commit, tag or branch; what it stood for is recorded
    data_dir: str | None = None  # hub: folder within the data set
    include: list[str] = dataclasses.field(default_factory=list)  # hub: only files with names like one of these globs
    streaming: bool = True  # hub: read over the network; false: download each file first and keep it
    parts: list[str] = dataclasses.field(default_factory=lambda: ["topics", "docstrings"])  # machine_docs
    exclude: list[str] = dataclasses.field(default_factory=list)  # globs on paths within the standard library

    # What a row is (files, hub); names may be dotted paths
    column: str | None = (
        None  # a text, or the turns of a conversation; null: `messages` where there is one, else `text`
    )
    prompt: str | None = None  # instead: the column of a question
    response: str | None = None  # and that of its answer
    system: str | None = None  # and perhaps that of a system message

    # What is kept
    normalise: list[str] = dataclasses.field(default_factory=list)  # newlines | control | nfc | trim
    filters: dict[str, typing.Any] = dataclasses.field(
        default_factory=dict
    )  # name -> options, see data_prep/filters.py
    dedup: str = "exact"  # none | exact | minhash (near duplicates too)
    near_duplicate: float = 0.8  # minhash: Jaccard similarity of 5-grams from which on a document is one
    decontaminate: bool = True  # against the benchmarks, when the data set names them
    min_bytes: int = 1  # shorter documents are dropped
    max_bytes: int | None = None  # training text to keep, chosen by hash; null: everything
    max_validation_bytes: int | None = None  # the same for held-out text

    # What it becomes
    layout: str = "stream"  # stream: documents in a row | packed: whole documents fitted into rows
    row_length: int | None = None  # packed: tokens a row, one more than the sequence length


@dataclasses.dataclass
class BenchmarksConfig:
    """What training text must not contain."""

    mirror: str | None = None  # folder of eval.prepare_data; null: text is not compared with benchmarks
    extra: list[str] = dataclasses.field(default_factory=list)  # globs of further items: .jsonl or .json files
    ngram: int = 13  # words in a row that a text may not share with an item
    short_ngram: int = 8  # for items of fewer words than that
    passages: bool = False  # also compare with passages that questions are about (BoolQ, DROP: text of Wikipedia)


@dataclasses.dataclass
class DataConfig:
    """A data set: where it goes, its tokenizer and its sources."""

    out: str = MISSING  # folder
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    benchmarks: BenchmarksConfig = dataclasses.field(default_factory=BenchmarksConfig)
    validation_fraction: float = 0.03  # of documents, held out by hash
    shard_tokens: int = 1 << 25  # a shard is closed once it holds so many
    part_bytes: int = 1 << 28  # input that one process works on by itself; parts never share a shard


def load(file: Path, overrides: Iterable[str] = ()) -> DataConfig:
    """Read a YAML file, then `key.sub=value` overrides. Raises UserError naming the key and what would be right."""
    if not file.is_file():
        raise UserError(f"config file not found: {file}")
    config = OmegaConf.structured(DataConfig)
    for override in overrides:
        if "=" not in override:
            raise UserError(f"override {override!r} is not of the form key.sub=value")
    try:
        layers = {str(file): OmegaConf.load(file), "command line": OmegaConf.from_dotlist(list(overrides))}
    except Exception as error:  # whatever the YAML parser raises
        raise UserError(f"{file} is not readable YAML: {error}") from None
    try:
        for origin, layer in layers.items():
            refuse_unknown(OmegaConf.to_container(layer), DataConfig, "", origin)
            config = OmegaConf.merge(config, layer)
        missing = sorted(OmegaConf.missing_keys(config))
        if missing:
            raise UserError(f"{file}: {missing[0]} is not set")
        result = typing.cast(DataConfig, OmegaConf.to_object(config))
    except OmegaConfBaseException as error:
        raise UserError(f"{file}: {error.full_key or ''}: {str(error.msg or error).splitlines()[0]}") from None
    _validate(result, file)
    return result


def _validate(config: DataConfig, file: Path) -> None:
    tokenizer = config.tokenizer
    rules = [
        (bool(config.sources), "sources is empty: name at least one source"),
        (0 <= config.validation_fraction < 1, f"validation_fraction ({config.validation_fraction}) must lie in [0, 1)"),
        (config.shard_tokens > 0, f"shard_tokens ({config.shard_tokens}) must be above 0"),
        (config.part_bytes > 0, f"part_bytes ({config.part_bytes}) must be above 0"),
        (
            2 <= config.benchmarks.short_ngram <= config.benchmarks.ngram,
            f"benchmarks.short_ngram ({config.benchmarks.short_ngram}) must lie between 2 and benchmarks.ngram"
            f" ({config.benchmarks.ngram})",
        ),
        _choice("tokenizer.kind", tokenizer.kind, TOKENIZER_KINDS),
        (tokenizer.kind != "folder" or bool(tokenizer.path), "tokenizer.kind folder needs tokenizer.path"),
        (tokenizer.vocab_size >= 512, f"tokenizer.vocab_size ({tokenizer.vocab_size}) must be at least 512"),
    ]
    for name, source in config.sources.items():
        key = f"sources.{name}"
        rules.append((bool(re.fullmatch(r"[A-Za-z0-9_-]+", name)), f"{key}: a name has letters, digits, _ and - only"))
        rules += _source_rules(key, source)
    rules.append(
        (
            sum(source.weight for source in config.sources.values()) > 0,
            "the weights of all sources add up to 0: give at least one source a weight above 0",
        )
    )
    for holds, message in rules:
        if not holds:
            raise UserError(f"{file}: {message}")


def _source_rules(key: str, source: SourceConfig) -> list[tuple[bool, str]]:
    packed, reads_rows = source.layout == "packed", source.kind in ("files", "hub")
    return [
        _choice(f"{key}.kind", source.kind, KINDS),
        _choice(f"{key}.domain", source.domain, DOMAINS),
        _choice(f"{key}.layout", source.layout, LAYOUTS),
        _choice(f"{key}.dedup", source.dedup, DEDUP),
        *(_choice(f"{key}.parts", part, DOC_PARTS) for part in source.parts),
        *(_choice(f"{key}.normalise", step, NORMALISE) for step in source.normalise),
        *(_choice(f"{key}.filters", name, FILTERS) for name in source.filters),
        (source.weight >= 0, f"{key}.weight ({source.weight}) must not be below 0"),
        (0 < source.near_duplicate <= 1, f"{key}.near_duplicate ({source.near_duplicate}) must lie in (0, 1]"),
        (packed == (source.row_length is not None), f"{key}: layout packed and row_length belong together"),
        (source.row_length is None or source.row_length > 2, f"{key}.row_length must be above 2"),
        (bool(source.paths) == (source.kind == "files"), f"{key}: paths and kind files belong together"),
        (bool(source.path) == (source.kind == "hub"), f"{key}: path and kind hub belong together"),
        (bool(source.prompt) == bool(source.response), f"{key}: prompt and response belong together"),
        (not (source.column and source.prompt), f"{key}: column and prompt exclude each other"),
        (reads_rows or not (source.column or source.prompt), f"{key}: {source.kind} has no columns"),
        *(
            (value is None or value > 0, f"{key}.{limit} ({value}) must be above 0")
            for limit in ("min_bytes", "max_bytes", "max_validation_bytes")
            for value in [getattr(source, limit)]
        ),
    ]


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> tuple[bool, str]:
    return value in allowed, f"{key} is {value!r}; it must be one of {', '.join(allowed)}"
