"""`mm_train.export --format executorch`: what is refused, and, where executorch is installed, the whole way."""

import importlib.util
import json
import re
import struct
import textwrap

import pytest

from mm_train.export.__main__ import main
from tests.mm_train.gguf.conftest import DENSE
from tests.mm_train.gguf.conftest import tokenizer as tokenizer
from tests.mm_train.gguf.test_export import run as run

INSTALLED = importlib.util.find_spec("executorch") is not None


def export(source, out, *flags):
    return main(["--checkpoint", str(source), "--out", str(out), "--format", "executorch", *flags])


def test_what_is_refused_is_one_line_and_leaves_nothing(run, tmp_path, capsys):
    def refused(message, folder, *flags):
        assert export(folder, tmp_path / "out", *flags) == 2
        err = capsys.readouterr().err
        assert re.search(message, err), err
        assert "Traceback" not in err
        assert not (tmp_path / "out").exists()
        assert not list(tmp_path.glob(".out*"))

    refused("groups its experts along out .* ExecuTorch needs groups along in", run("along", enabled=True))
    refused("--float32 is for --format gguf", run("plain"), "--float32")
    if INSTALLED:
        refused("normalised sigmoid scores only", run("softmax", {"scoring_func": "softmax"}))
    else:
        refused(r"pip install 'mobilemoe-train\[executorch\]'", run("bare"))


def test_a_file_that_is_no_program(run, tmp_path, capsys):
    (tmp_path / "junk.pte").write_bytes(b"junk" * 20)
    folder = run(enabled=True, expert_group_axis="in")
    flags = ["--num-prompts", "1", "--tokens", "16", "--positions", "1", "--new-tokens", "0"]
    assert main(["verify", str(tmp_path / "junk.pte"), "--reference", str(folder), *flags]) == 2
    said = capsys.readouterr()
    assert "0 tensors equal bit for bit" in said.out
    assert "ExecuTorch cannot load" in said.err or "mobilemoe-train[executorch]" in said.err
    assert main(["verify", str(tmp_path / "none.pte"), "--reference", str(folder), *flags]) == 2
    assert "none.pte cannot be read" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.skipif(not INSTALLED, reason="needs the package executorch")
@pytest.mark.parametrize("changes", [{}, DENSE], ids=["moe", "dense"])
def test_codes_and_scales_and_what_it_says(run, tmp_path, changes):
    folder, out = run(changes=changes, enabled=True, expert_group_axis="in"), tmp_path / "out"
    assert export(folder, out) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *("README.md", "SHA256SUMS", "model.pte", "tokenizer.json", "tokenizer_config.json")
    ]
    flags = ["--num-prompts", "3", "--tokens", "300", "--positions", "4", "--new-tokens", "4"]
    flags += ["--prompts", textwrap.__file__, "--out", str(tmp_path / "v.json")]
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 0
    found = json.loads((tmp_path / "v.json").read_text())
    assert found["codes"]["equal"] > 10
    assert found["codes"]["differ"] == []
    values = found["runtimes"]["ExecuTorch"]["it without int8 activations"]
    assert values["KL"] < 0.01 or not changes  # a random router tips at the least rounding
    data = bytearray((out / "model.pte").read_bytes())
    data[data.find(struct.pack("<2i", 6712, 1)) + 64 + 5] ^= 1  # a code of the first experts
    (out / "model.pte").write_bytes(data)
    flags[1] = "1"
    assert main(["verify", str(out), "--reference", str(folder), *flags]) == 1
