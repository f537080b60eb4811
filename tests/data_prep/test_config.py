from fractions import Fraction
from pathlib import Path

import pytest
import yaml

from data_prep.config import load
from mm_train.cli import UserError
from mm_train.config import load as load_stage

GOOD = """
out: data/x
tokenizer: {kind: train_bpe, vocab_size: 1024}
sources:
  books: {kind: files, licence: CC0-1.0, domain: knowledge, paths: ["*.txt"]}
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


SHARES = {  # of the paper, in percent
    "pretrain": {"web": 62, "math": 11.6, "code": 10, "knowledge": 10, "science": 6.4},
    "midtrain": {"knowledge": 32, "code": 22, "math": 21, "web": 9, "science": 16},
    "sft": {"math": 30.4, "chat": 25.4, "code": 22.1, "safety": 9.4, "science": 7.7, "tools": 3.9, "reasoning": 1.1},
}


@pytest.mark.parametrize("name", SHARES)
def test_the_stand_ins_have_the_shares_of_the_paper(name):
    text = Path(f"configs/data/{name}.yaml").read_text()
    assert "STAND-INS" in text
    sources = load(Path(f"configs/data/{name}.yaml")).sources
    assert all("weight" in source for source in yaml.safe_load(text)["sources"].values())
    weights = {source: Fraction(str(config.weight)) for source, config in sources.items()}
    for domain, share in SHARES[name].items():
        found = sum(weights[source] for source, config in sources.items() if config.domain == domain)
        assert found / sum(weights.values()) == Fraction(str(share)) / 100, domain
    assert {config.domain for config in sources.values()} == set(SHARES[name])


@pytest.mark.parametrize("stage", ["pretrain", "midtrain", "sft", "qat"])
def test_the_stages_mix_what_is_prepared_for_them(stage):
    config = load_stage([Path("configs/model/s.yaml"), Path(f"configs/stage/{stage}.yaml")], ["run.dir=x"])
    prepared = load(Path(f"configs/data/{'sft' if stage == 'qat' else stage}.yaml"))
    assert config.data.path == prepared.out
    assert config.data.mixture == {name: source.weight for name, source in prepared.sources.items()}
    rows = {source.row_length for source in prepared.sources.values()}
    assert rows == {None if stage == "pretrain" else config.data.seq_len + 1}
    domains = [prepared.sources[name].domain for name in config.data.validation]
    assert sorted(domains) == sorted({source.domain for source in prepared.sources.values()})


BAD = {
    "unknown key validation_fractoin (did you mean validation_fraction?)": GOOD + "validation_fractoin: 0.1",
    "unknown key sources.books.licens (did you mean sources.books.licence?)": GOOD.replace("licence", "licens"),
    "unknown key tokenizer.speed (known: kind, vocab_size": GOOD.replace("vocab_size", "speed"),
    "sources.books.domain is not set": GOOD.replace("domain: knowledge, ", ""),
    "tokenizer.kind is 'bpe'; it must be one of train_bpe, llama3, folder": GOOD.replace("train_bpe", "bpe"),
    "tokenizer.vocab_size (100) must be at least 512": GOOD.replace("1024", "100"),
    "vocab_size: Value 'many'": GOOD.replace("1024", "many"),
    "tokenizer.kind folder needs tokenizer.path": GOOD.replace("train_bpe", "folder"),
    "sources.books.kind is 'books'; it must be one of stdlib_code": GOOD.replace("files", "books"),
    "layout packed and row_length belong together": GOOD.replace("paths:", "layout: packed, paths:"),
    "sources.books.domain is 'prose'; it must be one of web, code, math": GOOD.replace("knowledge", "prose"),
    "the weights of all sources add up to 0": GOOD.replace("paths:", "weight: 0, paths:"),
    "sources.books.weight (-1.0) must not be below 0": GOOD.replace("paths:", "weight: -1, paths:"),
    "path and kind hub belong together": GOOD.replace("paths:", "path: a/b, paths:"),
    "prompt and response belong together": GOOD.replace("paths:", "prompt: q, paths:"),
    "column and prompt exclude each other": GOOD.replace("paths:", "column: a, prompt: q, response: r, paths:"),
    "stdlib_code has no columns": GOOD.replace("files", "stdlib_code").replace('paths: ["*.txt"]', "column: text"),
    "filters is 'good'; it must be one of gopher_quality": GOOD.replace("paths:", "filters: {good: {}}, paths:"),
    "normalise is 'lower'; it must be one of newlines": GOOD.replace("paths:", "normalise: [lower], paths:"),
    "benchmarks.short_ngram (8) must lie between 2 and benchmarks.ngram (5)": GOOD + "benchmarks: {ngram: 5}",
    "paths and kind files belong together": GOOD.replace("files", "stdlib_code"),
    "sources.books.max_bytes (0) must be above 0": GOOD.replace("paths:", "max_bytes: 0, paths:"),
    "validation_fraction (1.5) must lie in [0, 1)": GOOD + "validation_fraction: 1.5",
    "sources is empty": GOOD[: GOOD.index("sources")],
    "a name has letters": GOOD.replace("books", "../books"),
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
