"""Folders that are not what they should be: each is refused in one line that names what is wrong."""

import contextlib
import json
import struct

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from mm_train.cli import UserError
from mm_train.generate import main
from mm_train.model import MobileMoE
from mm_train.release import load_release, save_release

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ROPE = {"factor": 8.0, "original_max_position_embeddings": 64, "low_freq_factor": 1.0, "high_freq_factor": 1.0}
QWEIGHT, SCALE = "model.embed_tokens.qweight", "model.embed_tokens.weight_scale"


@pytest.fixture(scope="module")
def release(small_model, byte_tokenizer, tmp_path_factory):
    """(folder, format, shards) -> a good release of a small model there."""
    model = MobileMoE(small_model)
    model.init_weights(0)

    def write(folder, format, shards):
        save_release(model, folder, format, byte_tokenizer, 20_000 if shards else 10**9)
        return folder

    return write


def tensors(change):
    """A damage done to the tensors of model.safetensors."""

    def damage(folder):
        values = load_file(folder / WEIGHTS)
        change(values)
        save_file(values, folder / WEIGHTS, metadata={"format": "pt"})

    return damage


def values(file, change):
    """A damage done to a JSON file."""

    def damage(folder):
        content = json.loads((folder / file).read_text())
        change(content)
        (folder / file).write_text(json.dumps(content))

    return damage


def text(file, old, new):
    """A damage done to the text of a file."""

    def damage(folder):
        content = (folder / file).read_bytes()
        assert old in content
        (folder / file).write_bytes(content.replace(old, new, 1))

    return damage


def header(change):
    """A damage done to the header of model.safetensors; the rest of the file stays."""

    def damage(folder):
        data = (folder / WEIGHTS).read_bytes()
        length = struct.unpack("<Q", data[:8])[0]
        new = change(data[8 : 8 + length])
        (folder / WEIGHTS).write_bytes(struct.pack("<Q", len(new)) + new + data[8 + length :])

    return damage


def say_twice(raw: bytes) -> bytes:
    """The first tensor of a header once more."""
    parsed = json.loads(raw)
    name = next(key for key in parsed if key != "__metadata__")
    return raw.replace(b"{", b"{" + json.dumps(name).encode() + b":" + json.dumps(parsed[name]).encode() + b",", 1)


def fill(name, value):
    return tensors(lambda t: t[name].view(-1).__setitem__(0, value))


def cast(name, dtype):
    return tensors(lambda t: t.__setitem__(name, t[name].to(dtype)))


def truncate(file, keep):
    return lambda folder: (folder / file).write_bytes((folder / file).read_bytes()[:keep])


def move_shard(folder):
    index = json.loads((folder / INDEX).read_text())
    file = index["weight_map"]["model.norm.weight"]
    (folder.parent / "elsewhere.safetensors").write_bytes((folder / file).read_bytes())
    index["weight_map"]["model.norm.weight"] = "../elsewhere.safetensors"
    (folder / INDEX).write_text(json.dumps(index))


BAD = {  # name: (format, sharded, damage, what the line says)
    "missing tensor": ("int4", 0, tensors(lambda t: t.pop("model.norm.weight")), "tensor model.norm.weight is missing"),
    "missing scales": ("int4", 0, tensors(lambda t: t.pop(SCALE)), f"tensor {SCALE} is missing"),
    "unknown tensor": ("int4", 0, tensors(lambda t: t.update(extra=torch.zeros(1))), "unknown tensor extra"),
    "an lm_head": (
        "bf16",
        0,
        tensors(lambda t: t.update({"lm_head.weight": torch.zeros(512, 64)})),
        "unknown tensor lm_head.weight",
    ),
    "wrong dtype of codes": ("int4", 0, cast(QWEIGHT, torch.int8), f"tensor {QWEIGHT} has dtype I8; it must be U8"),
    "wrong dtype of scales": ("int4", 0, cast(SCALE, torch.bfloat16), f"{SCALE} has dtype BF16; it must be F16"),
    "wrong dtype of a norm": (
        "bf16",
        0,
        cast("model.norm.weight", torch.float16),
        "tensor model.norm.weight has dtype F16; it must be F32 or BF16",
    ),
    "wrong dtype of a weight": (
        "bf16",
        0,
        cast("model.embed_tokens.weight", torch.int32),
        "tensor model.embed_tokens.weight has dtype I32; it must be F32 or BF16",
    ),
    "wrong shape": (
        "bf16",
        0,
        tensors(lambda t: t.update({"model.norm.weight": torch.zeros(3).bfloat16()})),
        "tensor model.norm.weight has shape (3,); this model has (64,)",
    ),
    "scales of another group size": (
        "int4",
        0,
        tensors(lambda t: t.update({SCALE: torch.zeros(512, 4).half()})),
        f"tensor {SCALE} has shape (512, 4); this model has (512, 2)",
    ),
    "NaN scale": ("int4", 0, fill(SCALE, float("nan")), f"tensor {SCALE} holds NaN or infinity"),
    "infinite scale": ("int4", 0, fill(SCALE, float("inf")), f"tensor {SCALE} holds NaN or infinity"),
    "negative scale": ("int4", 0, fill(SCALE, -1.0), "the scales of model.embed_tokens.weight are negative"),
    "NaN weight": ("bf16", 0, fill("model.norm.weight", float("nan")), "model.norm.weight holds NaN or infinity"),
    "another group size": (
        "int4",
        0,
        values("config.json", lambda c: c["quantization"].update(group_size=64)),
        "quantization.group_size is 64; this format has 32",
    ),
    "another format": (
        "int4",
        0,
        values("config.json", lambda c: c["quantization"].update(format="gptq")),
        "quantization.format is 'gptq'; this format has 'mobilemoe-int4-g32'",
    ),
    "another expert axis": (
        "int4",
        0,
        values("config.json", lambda c: c["quantization"].update(expert_group_axis="in")),
        "quantization.expert_group_axis is 'in'",
    ),
    "incomplete quantization": (
        "int4",
        0,
        values("config.json", lambda c: c["quantization"].pop("packed")),
        "quantization.packed is None; this format has True",
    ),
    "quantization of the wrong kind": (
        "int4",
        0,
        values("config.json", lambda c: c.update(quantization="int4")),
        "quantization is 'int4'; it must be a mapping",
    ),
    "quantized by another program": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"})),
        "quantization_config is another program's format",
    ),
    "int4 without its key": (
        "int4",
        0,
        values("config.json", lambda c: c.pop("quantization")),
        "tensor model.embed_tokens.weight is missing",
    ),
    "another architecture": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(model_type="llama")),
        "model_type is 'llama'; it must be 'mobilemoe'",
    ),
    "another attention": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(use_qk_norm=False)),
        "use_qk_norm is False; it must be True",
    ),
    "layers without RoPE": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(no_rope_layers=[1, 0])),
        "no_rope_layers is [1, 0]; it must be 2 times 1",
    ),
    "an untied head": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(tie_word_embeddings=False)),
        "tie_word_embeddings is False; it must be True",
    ),
    "missing key": ("bf16", 0, values("config.json", lambda c: c.pop("rope_theta")), "lacks the key rope_theta"),
    "value of the wrong type": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(hidden_size="wide")),
        "hidden_size",
    ),
    "negative size": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(num_hidden_layers=-1)),
        "model.num_hidden_layers is -1; it must be above 0",
    ),
    "more layers than tensors": (
        "bf16",
        0,
        values(
            "config.json", lambda c: [c.update(num_hidden_layers=1000), c.pop("no_rope_layers"), c.pop("layer_types")]
        ),
        "tensor model.layers.2.input_layernorm.weight is missing",
    ),
    "more layers than anybody has": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(num_hidden_layers=10**12)),
        "model.num_hidden_layers is 1000000000000; it must be above 0 and at most 1,024",
    ),
    "a width beyond any memory": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(vocab_size=2**24)),
        "this model has (16777216, 64)",
    ),
    "another RoPE scaling": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(rope_scaling=ROPE | {"rope_type": "yarn"})),
        "model.rope_scaling.rope_type is 'yarn'; it must be 'llama3'",
    ),
    "incomplete RoPE scaling": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(rope_scaling={"rope_type": "llama3", "factor": 8.0})),
        "rope_scaling lacks the key original_max_position_embeddings",
    ),
    "RoPE said in two ways": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(rope_parameters={"rope_theta": 10.0, "rope_type": "default"})),
        "rope_parameters says 10.0 of rope_theta, which itself is 500000.0",
    ),
    "an interpolation": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(scoring_func="${oc.env:HOME}")),
        "model.scoring_func is '${oc.env:HOME}'; it must be one of sigmoid, softmax",
    ),
    "a mark for nothing": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(rms_norm_eps="???")),
        "rms_norm_eps is '???'; it must be of type float",
    ),
    "a word for a truth value": (
        "bf16",
        0,
        values("config.json", lambda c: c.update(norm_topk_prob="false")),
        "norm_topk_prob is 'false'; it must be of type bool",
    ),
    "a number beyond floats": (
        "bf16",
        0,
        text("config.json", b'"rope_theta": 500000.0', b'"rope_theta": 1' + b"0" * 400),
        "rope_theta is 1000",
    ),
    "a list for a config": (
        "bf16",
        0,
        lambda folder: (folder / "config.json").write_text("[1]"),
        "is not valid JSON for this purpose: [1] is not an object",
    ),
    "config cut short": ("bf16", 0, truncate("config.json", 40), "config.json is not valid JSON"),
    "a key said twice": (
        "bf16",
        0,
        text("config.json", b'"hidden_size": 64', b'"hidden_size": 64, "hidden_size": 64'),
        "the key 'hidden_size' occurs twice",
    ),
    "NaN in the config": (
        "bf16",
        0,
        text("config.json", b'"rope_theta": 500000.0', b'"rope_theta": NaN'),
        "NaN is not JSON",
    ),
    "weights cut short": ("int4", 0, truncate(WEIGHTS, 30_000), "model.safetensors is damaged"),
    "header cut short": ("int4", 0, truncate(WEIGHTS, 100), "model.safetensors is not valid JSON"),
    "empty weights": ("int4", 0, truncate(WEIGHTS, 0), "model.safetensors is not valid JSON"),
    "a header of terabytes": (
        "int4",
        0,
        lambda folder: (folder / WEIGHTS).write_bytes(b"\xff" * 7 + b"\x00" + b"{}"),
        "its header claims 72,057,594,037,927,935 bytes",
    ),
    "a tensor said twice": ("int4", 0, header(say_twice), "occurs twice"),
    "tensors that overlap": (
        "int4",
        0,
        header(lambda raw: raw.replace(b'"data_offsets":[0,', b'"data_offsets":[1,', 1)),
        "model.safetensors is damaged",
    ),
    "no weights": ("int4", 0, lambda folder: (folder / WEIGHTS).unlink(), f"has no {WEIGHTS} and no {INDEX}"),
    "a way out of the folder": ("bf16", 1, move_shard, "must be the plain name of a .safetensors file"),
    "an absolute path": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "/etc/passwd"})),
        "file '/etc/passwd' of tensor model.norm.weight must be the plain name",
    ),
    "a number for a file": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": 3})),
        "file 3 of tensor model.norm.weight must be the plain name",
    ),
    "a shard that is gone": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "gone.safetensors"})),
        "names gone.safetensors, which is not in the folder",
    ),
    "a file name of 300 letters": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "x" * 300 + ".safetensors"})),
        "which is not in the folder",
    ),
    "a tensor in another shard": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update({"model.norm.weight": "model-00001-of-00012.safetensors"})),
        "model-00012-of-00012.safetensors holds tensor model.norm.weight, but",
    ),
    "a tensor that the index forgot": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].pop("model.norm.weight")),
        "holds tensor model.norm.weight, but model.safetensors.index.json does not know it",
    ),
    "an index of tensors that are nowhere": (
        "bf16",
        1,
        values(INDEX, lambda c: c["weight_map"].update(ghost=c["weight_map"]["model.norm.weight"])),
        "puts tensor ghost into",
    ),
    "an index without a map": ("bf16", 1, values(INDEX, lambda c: c.pop("weight_map")), "weight_map is None"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_malformed_folder_is_refused_in_one_line(case, release, tmp_path, capsys):
    format, shards, damage, message = BAD[case]
    folder = release(tmp_path / "release", format, shards)
    command = ["--model", str(folder), "--prompt", "a", "--max-new-tokens", "1"]
    assert main(command) == 0
    capsys.readouterr()
    damage(folder)
    assert main(command) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("error: ")
    assert output.err.count("\n") == 1
    assert message in output.err


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**40), 10**40) | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=5,
)


@pytest.fixture(scope="module")
def folders(release, tmp_path_factory):
    root = tmp_path_factory.mktemp("fuzz")
    return [release(root / "int4", "int4", 0), release(root / "shards", "bf16", 1)]


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_value_of_any_key_is_loaded_or_refused(folders, data):
    folder = data.draw(st.sampled_from(folders))
    config = json.loads((folder / "config.json").read_text())
    key = data.draw(st.sampled_from(sorted(config)))
    inner = config[key] if isinstance(config[key], dict) and data.draw(st.booleans()) else config
    if inner is not config:
        key = data.draw(st.sampled_from(sorted(inner)))
    changed = config | _with(config, inner, key, data.draw(JSON))
    _load_changed(folder / "config.json", json.dumps(changed).encode())


@settings(deadline=None, max_examples=150)
@given(st.data())
def test_any_damage_to_the_bytes_of_a_file_is_loaded_or_refused(folders, data):
    folder = data.draw(st.sampled_from(folders))
    file = data.draw(st.sampled_from(sorted(p for p in folder.iterdir() if p.suffix in (".json", ".safetensors"))))
    content = bytearray(file.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, min(len(content), 6000) - 1))] = data.draw(st.integers(0, 255))
    _load_changed(file, bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2]))]))


def _with(config, inner, key, value):
    """`config` with one value changed, at the top or in the mapping `inner`."""
    if inner is config:
        return {key: value}
    name = next(name for name in config if config[name] is inner)
    return {name: inner | {key: value}}


def _load_changed(file, content):
    """Loading ends in a model or in a UserError, and in nothing else; the file is restored."""
    before = file.read_bytes()
    try:
        file.write_bytes(content)
        with contextlib.suppress(UserError), torch.no_grad():
            load_release(file.parent)(torch.arange(5)[None])
    finally:
        file.write_bytes(before)
