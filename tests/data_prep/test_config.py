from pathlib import Path

import pytest

from data_prep.config import load
from mm_train.cli import UserError

GOOD = """
out: data/x
tokenizer: {kind: train_bpe, vocab_size: 1024}
sources:
  books: {kind: text_files, licence: CC0-1.0, domain: prose, paths: ["*.txt"]}
"""


def load_text(tmp_path: Path, text: str, overrides=()):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return load(file, overrides)


def test_values_defaults_and_overrides(tmp_path):
    config = load_text(tmp_path, GOOD, ["sources.books.max_bytes=5", "out=elsewhere"])
    assert config.out == "elsewhere"
    assert config.sources["books"].max_bytes == 5
    assert config.sources["books"].layout == "stream"
    assert config.tokenizer.vocab_size == 1024


def test_every_shipped_config_is_valid():
    files = sorted(Path("configs/data").glob("*.yaml"))
    assert files
    for file in files:
        load(file)


BAD = {
    "unknown key validation_fractoin (did you mean validation_fraction?)": GOOD + "validation_fractoin: 0.1",
    "unknown key sources.books.licens (did you mean sources.books.licence?)": GOOD.replace("licence", "licens"),
    "unknown key tokenizer.speed (known: kind, vocab_size": GOOD.replace("vocab_size", "speed"),
    "sources.books.domain is not set": GOOD.replace("domain: prose, ", ""),
    "tokenizer.kind is 'bpe'; it must be one of train_bpe, llama3, folder": GOOD.replace("train_bpe", "bpe"),
    "tokenizer.vocab_size (100) must be at least 512": GOOD.replace("1024", "100"),
    "vocab_size: Value 'many'": GOOD.replace("1024", "many"),
    "tokenizer.kind folder needs tokenizer.path": GOOD.replace("train_bpe", "folder"),
    "sources.books.kind is 'books'; it must be one of stdlib_code": GOOD.replace("text_files", "books"),
    "layout packed and row_length belong together": GOOD.replace("paths:", "layout: packed, paths:"),
    "paths and kind text_files belong together": GOOD.replace("text_files", "stdlib_code"),
    "sources.books.max_bytes (0) must be above 0": GOOD.replace("paths:", "max_bytes: 0, paths:"),
    "validation_fraction (1.5) must lie in [0, 1)": GOOD + "validation_fraction: 1.5",
    "sources is empty": GOOD[: GOOD.index("sources")],
    "a source name has letters": GOOD.replace("books", "../books"),
    "sources must be a mapping": GOOD[: GOOD.index("sources")] + "sources: [1]",
    "the file must be a mapping": "- 1",
    "is not readable YAML": "out: [",
}


@pytest.mark.parametrize("message", BAD)
def test_bad_configs(tmp_path, message):
    with pytest.raises(UserError) as error:
        load_text(tmp_path, BAD[message])
    assert message in str(error.value)
    assert "\n" not in str(error.value) or message == "is not readable YAML"


def test_bad_override_and_missing_file(tmp_path):
    with pytest.raises(UserError, match=r"override 'out' is not of the form key\.sub=value"):
        load_text(tmp_path, GOOD, ["out"])
    with pytest.raises(UserError, match=r"command line: unknown key outt \(did you mean out\?\)"):
        load_text(tmp_path, GOOD, ["outt=x"])
    with pytest.raises(UserError, match="config file not found"):
        load(tmp_path / "none.yaml")
