"""The commands as people call them."""

import json
import os

import pytest
import torch
from safetensors.torch import load_file

from mm_train import config
from mm_train.checkpoint.__main__ import main
from mm_train.checkpoint.bench import bench_text
from mm_train.checkpoint.folders import latest
from mm_train.checkpoint.format import open_checkpoint
from mm_train.checkpoint.reader import Reader, open_newest, restore
from mm_train.checkpoint.writer import Writer
from mm_train.cli import UserError
from mm_train.engine import PlainEngine
from mm_train.inventory import KINDS
from mm_train.model import MobileMoE
from mm_train.model_folder import find_tokenizer, load_model
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import FACTS, engines, random_state, together, world


@pytest.fixture
def sharded(small_config, tmp_path):
    """(a run of four ranks, what it saved)"""
    small_config.checkpoint.asynchronous = False
    groups, state = world(ep=2, tp=2), random_state(small_config.model)
    ranks = engines(small_config.model, state, groups)
    writers = [Writer(tmp_path / "run", member, small_config) for member in groups]
    together(groups, lambda rank: writers[rank].save(20, ranks[rank], FACTS))
    return tmp_path / "run", state


def test_inspect_says_what_people_want_to_know(sharded, run, capsys):
    assert main(["inspect", str(sharded[0])]) == 0
    text = capsys.readouterr().out
    for part in (
        "step     20\n",
        "by       4 processes: engine deepspeed, expert_parallel 2, tensor_parallel 2, zero_stage 1",
        "data     24 samples, 8 a step; in 1000: code 1000",
        "model    small, 181,584 parameters",
        "stage pretrain",
        "holds    weight, exp_avg, exp_avg_sq",
        "rank-00003.safetensors",
        "the run has 1:",
    ):
        assert part in text, part
    (run / "checkpoints/step-00000002/rank-00000.safetensors").unlink()
    assert main(["inspect", str(run)]) == 0
    text = capsys.readouterr().out
    assert "the run has 3:" in text
    assert "step-00000002 is damaged: rank-00000.safetensors: No such file" in text


def test_inspect_lists_tensors_with_their_norms(sharded, capsys):
    run, state = sharded
    assert main(["inspect", str(latest(run)), "--tensors"]) == 0
    line = next(
        line for line in capsys.readouterr().out.splitlines() if "layers.0.feed_forward.experts.down_proj" in line
    )
    norms = [f"{float(state[kind][line.split()[0]].double().norm()):.6g}" for kind in KINDS]
    assert line.split()[1:] == ["8", "x", "32", "x", "64", "routed", "experts", *norms]


def test_inspect_for_programs(sharded, capsys):
    run, state = sharded
    assert main(["inspect", str(run), "--tensors", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["samples"], facts["model"]) == (20, 24, "small")
    layout = {"world": 4, "engine": "deepspeed", "expert_parallel": 2, "tensor_parallel": 2, "zero_stage": 1}
    assert facts["layout"] == layout
    assert facts["bytes"] == sum(file["bytes"] for file in facts["files"])
    assert [row["name"] for row in facts["tensors"]] == list(state["weight"])
    assert facts["checkpoints"][0]["folder"] == "step-00000020"


def test_verify_says_which_file_is_damaged(run, capsys):
    assert main(["verify", str(run)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 3
    assert all(line.startswith("ok ") and line.endswith(" MB/s") for line in lines)
    path = run / "checkpoints/step-00000002/rank-00000.safetensors"
    content = bytearray(path.read_bytes())
    content[5000] ^= 4
    path.write_bytes(content)
    (run / "checkpoints/step-00000001/manifest.json").unlink()
    (run / "checkpoints/latest").unlink()
    assert main(["verify", str(run)]) == 1
    latest_line, *lines = capsys.readouterr().out.splitlines()
    assert "latest cannot be read" in latest_line
    assert [line.split()[0] for line in lines] == ["ok", "DAMAGED", "DAMAGED"]
    assert "rank-00000.safetensors: its sha256 is not the one in the manifest" in lines[1]
    assert "manifest.json: No such file" in lines[2]
    assert main(["verify", str(run / "checkpoints/step-00000002")]) == 1
    assert main(["verify", str(run / "checkpoints/step-00000003")]) == 0


@pytest.mark.parametrize("files", [1, 3, 7])
def test_converted_files_hold_the_same_in_equal_shares(sharded, tmp_path, capsys, files, small_config):
    run, state = sharded
    out = tmp_path / "new" / "out"
    assert main(["convert", str(run), str(out), "--files", str(files)]) == 0
    assert f"step 20, weight, exp_avg, exp_avg_sq; {files} files" in capsys.readouterr().out
    reader = Reader(out).verify()
    sizes = [record.bytes for record in reader.records]
    assert len(sizes) == files
    assert max(sizes) - min(sizes) < 20_000  # headers, and torch's random state
    for kind in KINDS:
        assert all(torch.equal(reader.read(name, kind), tensor) for name, tensor in state[kind].items())
    old = Reader(latest(run))
    same = [key for key in old.manifest if key not in ("files", "sha256")]
    assert {key: reader.manifest[key] for key in same} == {key: old.manifest[key] for key in same}
    (alone,) = world()
    (fresh,) = engines(small_config.model, random_state(small_config.model, 1), [alone])
    torch.rand(1)
    restore(reader, fresh, alone)
    assert fresh.is_like(state)
    assert torch.equal(torch.get_rng_state(), old.rng_state())


def test_converted_weights_are_a_model_and_nothing_to_resume_from(run, tmp_path, byte_tokenizer, small_config):
    byte_tokenizer.save(run)
    assert main(["convert", str(run), str(tmp_path / "out"), "--weights-only"]) == 0
    whole = open_checkpoint(latest(run))
    assert open_checkpoint(tmp_path / "out").bytes < whole.bytes / 2.9
    stored = load_file(tmp_path / "out/rank-00000.safetensors")
    assert {key.split("/")[0] for key in stored} == {"weight", "rng"}
    ours, theirs = load_model(tmp_path / "out"), load_model(run)
    assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert find_tokenizer(tmp_path / "out") == tmp_path / "out"
    engine = PlainEngine(MobileMoE(small_config.model), small_config.optim)
    with pytest.raises(UserError, match="holds weights only: start a new stage from it with init_from"):
        restore(Reader(tmp_path / "out"), engine, Groups())
    with pytest.raises(UserError, match="has no exp_avg of"):
        Reader(tmp_path / "out").read("model.norm.weight", "exp_avg")
    again = tmp_path / "again"
    assert main(["convert", str(tmp_path / "out"), str(again), "--files", "2"]) == 0
    assert Reader(again).kinds == ("weight",)


def test_bad_input_is_one_line(run, tmp_path, capsys):
    path = run / "checkpoints/step-00000003/rank-00000.safetensors"
    path.write_bytes(bytes(path.stat().st_size))
    (tmp_path / "file").write_text("")
    out = str(tmp_path / "out")
    cases = {
        "no checkpoint in": ["inspect", str(tmp_path / "none")],
        f"no checkpoint in {tmp_path}": ["verify", str(tmp_path)],
        "is damaged: rank-00000.safetensors: its sha256": ["convert", str(run), out],
        f"{run} exists already": ["convert", str(run), str(run)],
        "--files is 0; it must be at least 1": ["convert", str(run), out, "--files", "0"],
        "Not a directory": ["convert", str(run / "checkpoints/step-00000002"), str(tmp_path / "file" / "out")],
        "--repeats is 0": ["bench", "configs/model/tiny.yaml", "--repeats", "0"],
        "no such folder": ["bench", "configs/model/tiny.yaml", "--folder", out],
        "config file not found": ["bench", "nothing.yaml"],
    }
    for text, words in cases.items():
        assert main(words) == 2, words
        error = capsys.readouterr().err
        assert text in error
        assert error.startswith("error: ")
        assert error.count("\n") == 1
    assert not os.path.exists(out)
    assert not list(tmp_path.glob("*.partial"))


def test_bench_compares_the_two_ways(small_config, tmp_path, capsys):
    config.save(small_config, tmp_path / "cfg.yaml")
    words = ["bench", str(tmp_path / "cfg.yaml"), "--repeats", "1", "--folder", str(tmp_path)]
    assert main([*words, "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["stalled_seconds"] == pytest.approx(facts["saving_seconds"] + facts["settling_seconds"])
    assert facts["ratio"] == pytest.approx(facts["stalled_seconds"] / facts["synchronous_seconds"])
    text = bench_text(facts)
    assert f"small: 181,568 parameters, checkpoint of {facts['bytes']:,} bytes" in text
    assert "forward and backward of 2 x 64 tokens" in text
    assert "training stands still" in text
    assert f"that is {facts['ratio']:.1%} of the time of writing at once" in text
    assert sorted(os.listdir(tmp_path)) == ["cfg.yaml"]


def test_what_was_converted_can_be_a_run_s_checkpoint_again(sharded, tmp_path):
    run, _ = sharded
    assert main(["convert", str(run), str(tmp_path / "other/checkpoints/step-00000020"), "--files", "2"]) == 0
    assert open_newest(tmp_path / "other", Groups(), print).step == 20
