import hashlib
import json
import shutil
import subprocess
import sys

import pytest

from mm_train.checkpoint.format import (
    FACTS,
    Damaged,
    Part,
    coverage_trouble,
    damaged_files,
    open_checkpoint,
    read_manifest,
    write_manifest,
)
from mm_train.cli import UserError
from mm_train.sharding import Box

NAME = "model.layers.0.feed_forward.experts.down_proj"  # [8, 32, 64]


@pytest.fixture
def folder(run, tmp_path):
    """A checkpoint that may be spoilt."""
    return run / "checkpoints" / "step-00000003"


def rewrite(folder, change):
    """The manifest with a change, as if it had been written so."""
    values = {key: value for key, value in read_manifest(folder).items() if key != "sha256"}
    change(values)
    write_manifest(folder, values)


def test_torch_is_not_loaded():
    modules = [f"mm_train.checkpoint.{name}" for name in ("boxes", "files", "format", "folders", "show", "__main__")]
    code = f"import sys, {', '.join(modules)}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=300).returncode == 0


def test_a_manifest_says_everything(folder, small_config, facts):
    found = open_checkpoint(folder)
    assert found.step == 3
    assert found.run_config == small_config
    assert facts.keys() == set(FACTS)
    layout = {"world": 1, "engine": "plain", "expert_parallel": 1, "tensor_parallel": 1, "zero_stage": 0}
    assert found.manifest.items() >= (facts | {"samples": 24, "layout": layout}).items()
    assert found.manifest["written"].endswith("+00:00")
    (record,) = found.records
    content = (folder / record.file).read_bytes()
    assert (record.bytes, record.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    assert damaged_files(folder, found.records) == []


def test_every_flipped_bit_of_a_manifest_is_found(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    stride = max(1, len(content) // 400)  # one bit of each of some 400 bytes, and each bit of the last ones
    places = [(at, at % 8) for at in range(0, len(content), stride)]
    places += [(at, bit) for at in range(len(content) - 3, len(content)) for bit in range(8)]
    for at, bit in places:
        path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
        with pytest.raises(Damaged, match=r"manifest\.json"):
            open_checkpoint(folder)
    path.write_bytes(content)
    open_checkpoint(folder)


@pytest.mark.parametrize("content", [b"", b"\n", b"garbage\xff", b"[]", b"{}", b"[" * 100_000, b'{"a": NaN}', b"null"])
def test_other_contents_of_a_manifest_are_damage(folder, content):
    (folder / "manifest.json").write_bytes(content)
    with pytest.raises(Damaged, match=r"step-00000003 is damaged: manifest\.json: it "):
        read_manifest(folder)


def test_a_key_said_twice_and_other_spaces_are_damage(folder):
    path = folder / "manifest.json"
    content = path.read_bytes()
    for other in (content.replace(b'"step":3', b'"step":9,"step":3'), content.replace(b",", b", ", 1), content[:-1]):
        path.write_bytes(other)
        with pytest.raises(Damaged, match="sha256 that it says of itself"):
            read_manifest(folder)


def test_other_formats_are_refused_by_name(folder):
    rewrite(folder, lambda values: values.update(format="mobilemoe-checkpoint-3"))
    with pytest.raises(UserError, match="of the format 'mobilemoe-checkpoint-3'; this version reads"):
        open_checkpoint(folder)
    (folder / "manifest.json").write_text(json.dumps({"format": "mobilemoe-checkpoint-1", "step": 3}, indent=1))
    with pytest.raises(
        UserError, match=r"step-00000003 is of the format mobilemoe-checkpoint-1; .* anew in another run\.dir"
    ):
        open_checkpoint(folder)


def file_of(values, **changes):
    values["files"][0].update(changes)


def part_of(values, **changes):
    values["files"][0]["parts"][0].update(changes)


@pytest.mark.parametrize(
    "change",
    [
        lambda v: file_of(v, file="../rank-00000.safetensors"),
        lambda v: file_of(v, file="/etc/passwd"),
        lambda v: file_of(v, file="sub/rank-00000.safetensors"),
        lambda v: file_of(v, file="rank-00000.safetensors\n"),
        lambda v: file_of(v, file="manifest.json"),
        lambda v: file_of(v, file=7),
        lambda v: file_of(v, sha256="A" * 64),
        lambda v: file_of(v, sha256=None),
        lambda v: file_of(v, bytes=-1),
        lambda v: file_of(v, bytes=True),
        lambda v: file_of(v, parts=None),
        lambda v: v.update(files={}),
        lambda v: v.update(files=[]),
        lambda v: v["files"].append(v["files"][0]),
        lambda v: v["files"][0].pop("parts"),
        lambda v: v.update(step=-1),
        lambda v: v.update(step="3"),
        lambda v: v.pop("config"),
        lambda v: v.update(kinds=["weights"]),
        lambda v: v.update(kinds=["exp_avg"]),
        lambda v: part_of(v, name=None),
        lambda v: part_of(v, key=["a"]),
        lambda v: part_of(v, range=[0, 1 << 40]),
        lambda v: part_of(v, range=[5, 4]),
        lambda v: part_of(v, range=[0]),
        lambda v: part_of(v, range=[0.0, 1]),
        lambda v: part_of(v, box={"start": [0], "shape": [512, 64]}),
        lambda v: part_of(v, box={"start": [-1, 0], "shape": [512, 64]}),
        lambda v: part_of(v, box={"start": [1, 0], "shape": [512, 64]}),
        lambda v: part_of(v, box=[[0, 0], [512, 64]]),
        lambda v: part_of(v, name="model.layers.9.x"),
    ],
)
def test_a_manifest_that_makes_no_sense_is_refused(folder, change):
    rewrite(folder, change)
    with pytest.raises(Damaged, match=r"step-00000003 is damaged: manifest\.json: "):
        open_checkpoint(folder)


@pytest.mark.parametrize(("shift", "problem"), [(-64, "holds 16,320 of the 16,384 "), (0, "")])
def test_missing_elements_are_counted(folder, shift, problem):
    def change(values):
        (part,) = [part for part in values["files"][0]["parts"] if part["name"] == NAME]
        part["range"][1] += shift

    rewrite(folder, change)
    if problem:
        with pytest.raises(Damaged, match=problem + f"elements of {NAME}"):
            open_checkpoint(folder)
    else:
        open_checkpoint(folder)


def whole_but(*parts):
    """What is wrong when NAME is made of (start, shape, first, stop)."""
    from mm_train import config, inventory

    model = config.Model(vocab_size=512, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_local_experts=8)
    mine = [Part(NAME, Box(start, shape), first, stop, NAME) for start, shape, first, stop in parts]
    rest = [
        Part(entry.name, Box((0,) * len(entry.shape), entry.shape), 0, entry.size, entry.name)
        for entry in inventory.tensors(model)
        if entry.name != NAME
    ]
    return coverage_trouble(model, rest + mine)


def test_parts_cover_every_element_once():
    half = (4, 32, 64), 0, 8192
    assert whole_but(((0, 0, 0), *half), ((4, 0, 0), *half)) is None
    assert whole_but(((0, 0, 0), (8, 32, 64), 0, 5), ((0, 0, 0), (8, 32, 64), 5, 16384)) is None
    assert "holds 8,192 of the 16,384 elements" in whole_but(((0, 0, 0), *half))
    assert "holds 0 of the 16,384 elements" in whole_but()
    # As many elements as there should be, but not these.
    assert "holds 8,192 of the 16,384 elements of" in whole_but(((0, 0, 0), *half), ((0, 0, 0), *half))
    assert "holds 6,144 of" in whole_but(((0, 0, 0), *half), ((1, 0, 0), *half))
    assert "twice" in whole_but(((0, 0, 0), (8, 32, 64), 0, 8193), ((0, 0, 0), (8, 32, 64), 8192, 16384))
    assert "no part of" in whole_but(((0, 0), (8, 32), 0, 256))
    assert "no part of" in whole_but(((0, 0, 1), (8, 32, 64), 0, 16384))


@pytest.mark.parametrize("how", ["missing", "short", "long", "folder"])
def test_the_length_of_a_file_is_checked_at_once(folder, how):
    path = folder / "rank-00000.safetensors"
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "folder":
        path.unlink()
        path.mkdir()
    else:
        path.write_bytes(content[:-1] if how == "short" else content + b"\0")
    with pytest.raises(
        Damaged, match=r"is damaged: rank-00000\.safetensors: (No such file|it has [\d,]+ bytes instead)"
    ):
        open_checkpoint(folder)


def test_a_run_config_of_another_version_is_named(folder):
    rewrite(folder, lambda values: values["config"]["train"].update(stpes=1))
    with pytest.raises(UserError, match=r"unknown key train\.stpes") as caught:
        open_checkpoint(folder)
    assert not isinstance(caught.value, Damaged)


def test_an_unreadable_folder_is_damage(folder):
    shutil.rmtree(folder)
    with pytest.raises(Damaged, match="No such file"):
        open_checkpoint(folder)
