"""`mm_train.export --format gguf` and `mm_train.export verify`, as commands."""

import dataclasses
import hashlib
import json
import shutil
import textwrap

import pytest

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.engine import PlainEngine
from mm_train.export.__main__ import main
from mm_train.gguf import write
from mm_train.gguf.read import read_model
from mm_train.parallel.groups import Groups
from tests.mm_train.gguf.conftest import DENSE, SCALED, network

gguf = pytest.importorskip("gguf")


@pytest.fixture
def run(small_config, tmp_path, tokenizer):
    """A function that makes a run folder with one checkpoint, of the given quantisation."""

    def make(name="run", changes=None, **quant):
        model = network(tokenizer.vocab_size, **(changes or {}))
        cfg = dataclasses.replace(small_config, model=model.config, quant=config.Quant(**quant))
        writer = Writer(tmp_path / name, Groups(), cfg)
        writer.save(7, PlainEngine(model, cfg.optim), {"samples": 0})
        writer.wait()
        tokenizer.save(tmp_path / name)
        return tmp_path / name

    return make


def export(source, out, *flags):
    return main(["--checkpoint", str(source), "--out", str(out), "--format", "gguf", *flags])


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["moe", "dense"])
def test_quantisation_aware_training_for_devices(run, tmp_path, capsys, changes):
    pytest.importorskip("xllamacpp")
    folder, out = run(changes=changes, enabled=True, expert_group_axis="in"), tmp_path / "out"
    assert export(folder, out) == 0
    assert "quantised" not in capsys.readouterr().out
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "SHA256SUMS", "model.gguf"]
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((out / name).read_bytes()).hexdigest() == digest
    flags = ["--num-prompts", "3", "--tokens", "64", "--positions", "4", "--new-tokens", "4"]
    flags += ["--prompts", textwrap.__file__, "--out", str(tmp_path / "v.json")]
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 0
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["codes"]["equal"] > 10
    assert found["codes"]["differ"] == []
    numbers = found["runtimes"]["llama.cpp"]
    assert set(numbers) == {"the reference", "it without int8 activations"}
    for values in numbers.values():  # int8 activations in blocks of 32, against a token's own scale or none
        assert values["KL"] > 0
        # A random router chooses between near equals, and rounding tips the balance: no bound for experts.
        assert values["KL"] < 0.01 or not changes


def test_a_file_with_one_code_changed_is_found(run, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    folder, out = run(enabled=True, expert_group_axis="in"), tmp_path / "out"
    assert export(folder, out) == 0
    (down,) = (t for t in gguf.GGUFReader(out / "model.gguf").tensors if t.name == "blk.1.ffn_down_exps.weight")
    data = bytearray((out / "model.gguf").read_bytes())
    data[int(down.data_offset) + 100] ^= 1
    (out / "model.gguf").write_bytes(data)
    flags = ["--num-prompts", "1", "--tokens", "16", "--positions", "1", "--new-tokens", "0"]
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 1
    assert "1 not\n  differs: model.layers.1.feed_forward.experts.down_proj\n" in capsys.readouterr().out


@pytest.mark.parametrize("changes", [{}, DENSE], ids=["moe", "dense"])
def test_a_release_is_compared_in_both_of_its_runtimes(run, tmp_path, changes):
    folder, out = run(changes=changes, enabled=True), tmp_path / "out"
    assert main(["--checkpoint", str(folder), "--out", str(out)]) == 0
    flags = ["--num-prompts", "2", "--tokens", "48", "--positions", "4", "--new-tokens", "4"]
    flags += ["--prompts", textwrap.__file__, "--out", str(tmp_path / "v.json")]
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 0
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["codes"]["differ"] == []
    ours, theirs = (found["runtimes"][name]["it without int8 activations"] for name in ("ours", "transformers"))
    assert ours["max |d log p|"] == pytest.approx(theirs["max |d log p|"], abs=1e-4)
    # Norms and selection bias are bfloat16 in a release, which tips a random router's balance here and there.
    assert ours["max |d log p|"] < 0.05 or not changes


def test_a_file_without_int4_is_not_called_equal(run, tmp_path, capsys):
    pytest.importorskip("xllamacpp")
    folder, out = run(), tmp_path / "out"
    assert export(folder, out, "--float32") == 0
    flags = ["--num-prompts", "1", "--tokens", "16", "--positions", "1", "--new-tokens", "0"]
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 0
    assert "there is no int4 tensor in it" in capsys.readouterr().out
    assert main(["verify", str(out), "--reference", str(folder), "--num-prompts", "0"]) == 2
    assert "--num-prompts 0" in capsys.readouterr().err


def test_after_training_it_says_so(run, tmp_path, capsys):
    assert export(run(), tmp_path / "out") == 0
    assert "quantised after training" in capsys.readouterr().out


def test_scaled_positions_need_flags_and_everybody_is_told(run, tmp_path, capsys):
    assert export(run(changes=SCALED), tmp_path / "out") == 0
    assert "IMPORTANT: run it with --yarn-beta-fast 1 --yarn-beta-slow 1" in capsys.readouterr().out
    assert "--yarn-beta-fast 1 --yarn-beta-slow 1" in (tmp_path / "out" / "README.md").read_text()


def test_another_axis_is_refused_unless_asked_for(run, tmp_path, capsys):
    folder = run(enabled=True)
    assert export(folder, tmp_path / "out") == 2
    assert "quant.expert_group_axis=in" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert export(folder, tmp_path / "out", "--requantise") == 0
    assert "quantised a second time, along another axis: relative error 0.0" in capsys.readouterr().out


def test_random_weights_for_measuring(tmp_path, tokenizer, capsys):
    tokenizer.save(tmp_path / "tok")
    flags = ["--format", "gguf", "--tokenizer", str(tmp_path / "tok"), "--out", str(tmp_path / "out")]
    assert main(["--random-weights", "configs/model/tiny.yaml", *flags]) == 0
    facts = read_model(tmp_path / "out" / "model.gguf")
    assert facts.name == "tiny"
    assert facts.tokenizer().sha256 == tokenizer.sha256  # rows of the embedding beyond it are no tokens


def test_bad_input_is_one_line_and_leaves_nothing(run, tmp_path, capsys, monkeypatch):
    folder, out = run(), tmp_path / "out"

    def refused(message, *argv):
        assert main([*argv, "--out", str(out)]) == 2
        err = capsys.readouterr().err
        assert message in err, err
        assert "Traceback" not in err
        assert not out.exists()
        assert not list(tmp_path.glob(".out*"))

    form = ["--format", "gguf"]
    refused("model folder not found", "--checkpoint", str(tmp_path / "none"), *form)
    (tmp_path / "empty").mkdir()
    refused("no checkpoint in", "--checkpoint", str(tmp_path / "empty"), *form)
    refused("--float32 is for --format gguf, not int4", "--checkpoint", str(folder), "--float32")
    refused("config file not found", "--random-weights", str(tmp_path / "none.yaml"), *form)
    refused("no tokenizer at", "--checkpoint", str(folder), "--tokenizer", str(tmp_path / "empty"), *form)
    bare = tmp_path / "bare"
    shutil.copytree(folder, bare)
    (bare / "tokenizer.json").unlink()
    refused("has no tokenizer.json", "--checkpoint", str(bare), *form)
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (weights, *_) = broken.glob("checkpoints/step-*/*.safetensors")
    weights.write_bytes(weights.read_bytes()[:-10])
    refused(str(weights.name), "--checkpoint", str(broken), *form)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(write, "_encode", full)
    refused("No space left on device", "--checkpoint", str(folder), *form)
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(folder), "--out", str(out), "--format", "int5"])
    assert "invalid choice: 'int5'" in capsys.readouterr().err
    out.mkdir()
    (out / "thesis.tex").write_text("do not lose me")
    assert export(folder, out) == 2
    assert "thesis.tex exists and was not written by this project" in capsys.readouterr().err
    assert (out / "thesis.tex").read_text() == "do not lose me"


def test_verify_refuses_what_it_cannot_compare(run, tmp_path, capsys):
    folder, out = run(enabled=True, expert_group_axis="in"), tmp_path / "out"
    assert export(folder, out) == 0
    other = run("other", {"hidden_size": 96}, enabled=True, expert_group_axis="in")
    (tmp_path / "short.txt").write_text("a few words")
    (tmp_path / "junk.gguf").write_bytes(b"GGUF" + bytes(50))
    for argv, message in (
        ([str(out), "--reference", str(other)], "and the network's is"),
        ([str(tmp_path / "junk.gguf"), "--reference", str(folder)], "is not a readable GGUF file"),
        ([str(tmp_path / "none.gguf"), "--reference", str(folder)], "GGUF file not found"),
        ([str(out), "--reference", str(folder), "--prompts", str(tmp_path / "short.txt")], "too few for a prompt"),
        ([str(out), "--reference", str(folder), "--prompts", str(tmp_path / "none")], "cannot read prompts"),
        ([str(tmp_path), "--reference", str(folder)], "model folder not found"),
    ):
        assert main(["verify", *argv]) == 2
        err = capsys.readouterr().err
        assert message in err or "no checkpoint in" in err, err
