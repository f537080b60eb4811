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

KINDS = ("stdlib_code", "machine_docs", "docstring_chat", "text_files")
TOKENIZER_KINDS = ("train_bpe", "llama3", "folder")
LAYOUTS = ("stream", "packed")
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

    kind: str = MISSING  # stdlib_code | machine_docs | docstring_chat | text_files
    licence: str = MISSING  # of the documents, as an SPDX name where there is one
    domain: str = MISSING  # free word for reports and mixtures: code, knowledge, ...
    paths: list[str] = dataclasses.field(default_factory=list)  # text_files: globs of .txt .md .py .jsonl files
    parts: list[str] = dataclasses.field(default_factory=lambda: ["topics", "docstrings"])  # machine_docs
    exclude: list[str] = dataclasses.field(default_factory=list)  # globs on paths within the standard library
    min_bytes: int = 1  # shorter documents are dropped
    max_bytes: int | None = None  # training text to keep, chosen by hash; null: everything
    max_validation_bytes: int | None = None  # the same for held-out text
    layout: str = "stream"  # stream: documents in a row | packed: whole documents fitted into rows, with a loss mask
    row_length: int | None = None  # packed: tokens a row, one more than the sequence length


@dataclasses.dataclass
class DataConfig:
    """A data set: where it goes, its tokenizer and its sources."""

    out: str = MISSING  # folder
    tokenizer: TokenizerConfig = dataclasses.field(default_factory=TokenizerConfig)
    sources: dict[str, SourceConfig] = dataclasses.field(default_factory=dict)
    validation_fraction: float = 0.03  # of documents, held out by hash
    shard_tokens: int = 1 << 25  # a shard is closed once it holds so many


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
        _choice("tokenizer.kind", tokenizer.kind, TOKENIZER_KINDS),
        (tokenizer.kind != "folder" or bool(tokenizer.path), "tokenizer.kind folder needs tokenizer.path"),
        (tokenizer.vocab_size >= 512, f"tokenizer.vocab_size ({tokenizer.vocab_size}) must be at least 512"),
    ]
    for name, source in config.sources.items():
        key = f"sources.{name}"
        packed = source.layout == "packed"
        rules += [
            (bool(re.fullmatch(r"[A-Za-z0-9_-]+", name)), f"{key}: a source name has letters, digits, _ and - only"),
            _choice(f"{key}.kind", source.kind, KINDS),
            _choice(f"{key}.layout", source.layout, LAYOUTS),
            *(_choice(f"{key}.parts", part, DOC_PARTS) for part in source.parts),
            (packed == (source.row_length is not None), f"{key}: layout packed and row_length belong together"),
            (source.row_length is None or source.row_length > 2, f"{key}.row_length must be above 2"),
            (bool(source.paths) == (source.kind == "text_files"), f"{key}: paths and kind text_files belong together"),
            *(
                (value is None or value > 0, f"{key}.{limit} ({value}) must be above 0")
                for limit in ("min_bytes", "max_bytes", "max_validation_bytes")
                for value in [getattr(source, limit)]
            ),
        ]
    for holds, message in rules:
        if not holds:
            raise UserError(f"{file}: {message}")


def _choice(key: str, value: str, allowed: tuple[str, ...]) -> tuple[bool, str]:
    return value in allowed, f"{key} is {value!r}; it must be one of {', '.join(allowed)}"
