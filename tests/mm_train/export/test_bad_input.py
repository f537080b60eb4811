"""What export refuses: one clear line, exit status 2, and nothing left where the folder was to be."""

import resource

import pytest
import torch

from mm_train.export.__main__ import main
from mm_train.model import MobileMoE
from mm_train.tokenizer import CONTROL_TOKENS, assemble, byte_alphabet
from tests.mm_train.gguf.conftest import tokenizer as tokenizer
from tests.mm_train.gguf.test_export import run as run

pytest.importorskip("gguf")

BOTH = pytest.mark.parametrize("format", ["int4", "gguf"])


@pytest.fixture
def refused(tmp_path, capsys):
    """A function that exports, and returns the one line that says why that was not possible."""

    def export(folder, format, *flags) -> str:
        assert main(["--checkpoint", str(folder), "--out", str(tmp_path / "new"), "--format", format, *flags]) == 2
        said = capsys.readouterr()
        lines = [line for line in said.err.split("\n") if line.strip() and "B/s]" not in line]
        assert len(lines) == 1, said.err
        assert lines[0].startswith("error: ")
        assert not (tmp_path / "new").exists()
        assert not list(tmp_path.glob(".new*"))
        print(f"{format}: {lines[0]}")
        return lines[0]

    return export


@BOTH
def test_no_such_folder_and_an_empty_one(tmp_path, refused, format):
    (tmp_path / "empty").mkdir()
    assert "none" in refused(tmp_path / "none", format)
    assert "no checkpoint in" in refused(tmp_path / "empty", format)


@pytest.mark.parametrize(("trained", "format"), [("in", "int4"), ("out", "gguf"), ("out", "executorch")])
def test_another_axis_than_the_formats(run, refused, trained, format):
    line = refused(run(enabled=True, expert_group_axis=trained), format)
    assert "quant.expert_group_axis=" in line
    assert "--requantise" in line


@BOTH
def test_a_checkpoint_that_lost_bytes_and_one_that_changed(run, tmp_path, refused, format):
    folder = run()
    (weights, *_) = folder.glob("checkpoints/step-*/*.safetensors")
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-10])
    assert weights.name in refused(folder, format)
    weights.write_bytes(whole[:-10] + bytes(byte ^ 1 for byte in whole[-10:]))
    assert weights.name in refused(folder, format)
    weights.unlink()
    assert weights.name in refused(folder, format)


@BOTH
def test_no_tokenizer_and_one_that_is_too_large(run, refused, format):
    folder = run()
    many = assemble({char: i for i, char in enumerate([*byte_alphabet(), *map(str, range(10, 900))])}, [])
    assert many.vocab_size > 512 + len(CONTROL_TOKENS)
    many.save(folder)
    assert "tokenizer" in refused(folder, format)
    (folder / "tokenizer.json").unlink()
    assert "has no tokenizer.json" in refused(folder, format)
    (folder / "tokenizer.json").write_text("{")
    assert "tokenizer.json" in refused(folder, format)


@BOTH
def test_a_full_disk(run, refused, format):
    """A file may not grow beyond 40 kB here, which the system says as it says that a disk is full."""
    folder = run()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        line = refused(folder, format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in line
    assert "File too large" in line or "is the disk full?" in line


@BOTH
def test_weights_that_are_not_finite(run, refused, format, monkeypatch):
    fresh = MobileMoE.init_weights

    def spoilt(model, seed):
        fresh(model, seed)
        with torch.no_grad():
            model.model.layers[1].self_attn.o_proj.weight[3, 3] = float("nan")

    monkeypatch.setattr(MobileMoE, "init_weights", spoilt)
    assert "layers.1.self_attn.o_proj.weight" in refused(run(), format)


@BOTH
def test_a_place_that_is_taken(run, tmp_path, capsys, format):
    out = tmp_path / "new"
    for what in ("file", "folder"):
        if what == "file":
            out.write_text("mine")
        else:
            out.unlink()
            out.mkdir()
            (out / "thesis.tex").write_text("mine")
        assert main(["--checkpoint", str(run(what)), "--out", str(out), "--format", format]) == 2
        assert "was not written by this project" in capsys.readouterr().err
    assert [path.name for path in out.iterdir()] == ["thesis.tex"]


def test_a_release_is_no_checkpoint(run, tmp_path, refused, capsys):
    assert main(["--checkpoint", str(run()), "--out", str(tmp_path / "bf16"), "--format", "bf16"]) == 0
    assert "is a bf16 release: it exports as int4, gguf or executorch, not bf16" in refused(tmp_path / "bf16", "bf16")
    assert main(["--checkpoint", str(tmp_path / "bf16"), "--out", str(tmp_path / "int4")]) == 0
    assert "quantised after training" in capsys.readouterr().out
    assert "is an int4 release" in refused(tmp_path / "int4", "int4")


def test_unknown_formats_and_flags_of_other_formats(run, tmp_path, refused, capsys):
    folder = run()
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(folder), "--out", str(tmp_path / "new"), "--format", "int5"])
    assert "invalid choice: 'int5'" in capsys.readouterr().err
    assert "--float32 is for --format gguf, not int4" in refused(folder, "int4", "--float32")
    assert "--tokenizer is for --format gguf and executorch, not bf16" in refused(folder, "bf16", "--tokenizer", "x")


def test_a_network_that_the_runtime_has_not(run, refused):
    assert "has no shared expert" in refused(run(changes={"intermediate_size_mlp": 0}), "gguf")
