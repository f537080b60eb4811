"""Profiling two small GGUF files for real: table, JSON, figure, and what is refused."""

import json
import math
import textwrap
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from data_prep.train_bpe import train_bpe
from eval.profile import main
from eval.profile_report import Profile, table
from mm_train.export.__main__ import main as export

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("models")
    train_bpe([Path(textwrap.__file__).read_text()], 512).save(folder / "tok")
    base = Path("configs/model/tiny.yaml").read_text().replace("num_hidden_layers: 4", "num_hidden_layers: 2")
    base = base.replace("intermediate_size: 64", "intermediate_size: 256")  # an expert is many pages of memory
    dense = base.replace("name: tiny", "name: dense").replace("num_local_experts: 16", "num_local_experts: 0")
    dense = dense.replace("num_experts_per_tok: 4", "num_experts_per_tok: 0")
    for name, text in (("tiny", base), ("dense", dense)):
        (folder / f"{name}.yaml").write_text(text)
        flags = ["--format", "gguf", "--tokenizer", str(folder / "tok"), "--out", str(folder / name)]
        assert export(["--random-weights", str(folder / f"{name}.yaml"), *flags]) == 0
    return [str(folder / "tiny"), str(folder / "dense" / "model.gguf")]


def test_two_models_side_by_side(models, tmp_path, capsys):
    flags = ["--contexts", "128,32", "--new-tokens", "4", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
    assert main(["--models", *models, *flags]) == 0
    found = json.loads((tmp_path / "profile.json").read_text())
    assert found["baseline"] == "dense"
    assert len(found["summary"]) == 2 * 2 * 2  # contexts, kinds, models
    by_cell = {(row["context"], row["kind"], row["model"]): row for row in found["summary"]}
    for row in found["summary"]:
        assert row["prefill"] > 0
        assert row["decode"] > 0
        assert 0 < row["of_bandwidth"] < 1
    # One token again and again meets few experts; a dense network reads everything either way.
    moe, dense = (
        [by_cell[128, kind, model]["touched"] for kind in ("repeated", "real")] for model in ("tiny", "dense")
    )
    assert moe[0] < 0.9 * moe[1]
    assert dense[0] > 0.9 * dense[1]
    assert found["models"]["tiny"]["active_bytes"] < found["models"]["tiny"]["file_bytes"] / 2
    text = (tmp_path / "profile.md").read_text()
    assert "| 128 real | tiny |" in text
    assert text in capsys.readouterr().out
    ET.fromstring((tmp_path / "profile.svg").read_bytes())


def test_ratios_are_taken_within_repeats():
    rows = [
        {"model": model, "repeat": repeat, "context": 32, "kind": "real", "decode": speed}
        for repeat, (fast, slow) in enumerate(((10, 5), (100, 50), (30, 10)))
        for model, speed in (("a", fast), ("b", slow))
    ]
    facts = {"file_bytes": 100, "active_bytes": 50, "kv_bytes": 0}
    profile = Profile("cpu", 1, 1000.0, "b", {"a": facts, "b": facts}, rows)
    assert profile.ratio("a", 32, "real", "decode") == 2
    assert profile.median("a", 32, "real", "decode") == 30
    assert profile.of_bandwidth("a", 32, "real") == pytest.approx(1.5)
    assert math.isnan(profile.median("a", 32, "real", "touched"))
    assert "30.0 (2.00x)" in table(profile)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--contexts", "many"], "must be numbers"),
        (["--contexts", "4"], "at least 16 tokens"),
        (["--contexts", "4096"], "holds 1024 tokens"),
        (["--new-tokens", "1"], "--new-tokens 1"),
        (["--baseline", "x"], "is none of the models: tiny, dense"),
        (["--device", "adb:1234"], "is not automated"),
        (["--device", "npu"], "only cpu"),
        (["--prompts", "none.txt"], "cannot read prompts"),
    ],
)
def test_what_cannot_be_profiled(models, tmp_path, capsys, flags, message):
    assert main(["--models", *models, "--out", str(tmp_path), *flags]) == 2
    assert message in capsys.readouterr().err


def test_files_that_are_no_models(models, tmp_path, capsys):
    (tmp_path / "a.gguf").write_bytes(b"junk" * 20)
    assert main(["--models", str(tmp_path / "a.gguf")]) == 2
    assert "is not a readable GGUF file" in capsys.readouterr().err
    assert main(["--models", models[0], models[0]]) == 2
    assert "both called tiny" in capsys.readouterr().err
