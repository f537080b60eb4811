"""What a release folder holds, and that reading it gives back what was written. Malformed ones: test_release_files."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_train import config, output_folder, release
from mm_train.cli import UserError
from mm_train.model import MobileMoE
from mm_train.quant import fake_quantise, quantise, unpack
from mm_train.release import load_release, save_release
from mm_train.release_format import QUANTIZATION, file_bytes, int4_names
from tests.mm_train.test_model import VARIANTS, by_the_specification


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    for layer in model.moe_layers():
        layer.expert_bias.copy_(torch.randn(8).bfloat16())
    return model


def test_bf16_folder_holds_the_weights_rounded_once(model, tmp_path, byte_tokenizer):
    save_release(model, tmp_path / "out", "bf16", byte_tokenizer)
    loaded = load_release(tmp_path / "out")
    for name, value in model.state_dict().items():
        want = value if "router" in name else value.bfloat16().float()
        assert torch.equal(loaded.state_dict()[name], want), name


def test_int4_folder_holds_exactly_what_quantisation_aware_training_saw(model, tmp_path):
    save_release(model, tmp_path / "out", "int4")
    loaded = dict(load_release(tmp_path / "out").named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            want = parameter.bfloat16().float()
        elif "router" in name:
            want = parameter
        else:
            want = fake_quantise(parameter)
        assert torch.equal(loaded[name], want), name


def test_names_dtypes_and_shapes_are_those_of_the_format(model, tmp_path):
    save_release(model, tmp_path / "out", "int4")
    tensors = {k: (str(v.dtype), tuple(v.shape)) for k, v in load_file(tmp_path / "out/model.safetensors").items()}
    layer = "model.layers.0."
    want = {
        "model.embed_tokens.qweight": ("torch.uint8", (512, 32)),
        "model.embed_tokens.weight_scale": ("torch.float16", (512, 2)),
        "model.norm.weight": ("torch.bfloat16", (64,)),
        layer + "input_layernorm.weight": ("torch.bfloat16", (64,)),
        layer + "self_attn.k_proj.qweight": ("torch.uint8", (32, 32)),
        layer + "self_attn.k_proj.weight_scale": ("torch.float16", (32, 2)),
        layer + "feed_forward.router.weight": ("torch.float32", (8, 64)),
        layer + "feed_forward.expert_bias": ("torch.bfloat16", (8,)),
        layer + "feed_forward.experts.gate_up_qweight": ("torch.uint8", (8, 64, 32)),
        layer + "feed_forward.experts.gate_up_scale": ("torch.float16", (8, 64, 2)),
        layer + "feed_forward.experts.down_qweight": ("torch.uint8", (8, 32, 32)),
        layer + "feed_forward.experts.down_scale": ("torch.float16", (8, 32, 2)),
        layer + "feed_forward.shared_expert.gate_proj.qweight": ("torch.uint8", (64, 32)),
    }
    assert {name: tensors[name] for name in want} == want
    assert len(tensors) == 3 + 2 * (4 + 4 * 2 + 2 * 2 + 3 * 2)
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config["model_type"] == "mobilemoe"
    assert config["quantization"]["format"] == "mobilemoe-int4-g32"
    assert "quantization_config" not in config
    assert len({path.stat().st_mode for path in (tmp_path / "out").iterdir()}) == 1


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_every_variant_comes_back_and_its_length_is_known_beforehand(small_model, tmp_path, changes, format):
    model = MobileMoE(dataclasses.replace(small_model, **changes))
    model.init_weights(0)
    (file,) = save_release(model, tmp_path / "out", format)
    assert file.stat().st_size == file_bytes(model.config, format)
    loaded = load_release(tmp_path / "out")
    assert loaded.config == dataclasses.replace(model.config, initializer_range=loaded.config.initializer_range)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], value, rtol=0, atol=0.01, msg=name)


def test_only_int4_asks_for_widths_that_groups_divide(small_model, tmp_path):
    odd = {"hidden_size": 50, "intermediate_size": 18, "intermediate_size_mlp": 42, "head_dim": 10}
    model = MobileMoE(dataclasses.replace(small_model, **odd)).eval()
    model.init_weights(0)
    save_release(model, tmp_path / "out", "bf16")
    tokens = torch.randint(0, 512, (1, 30))
    loaded = load_release(tmp_path / "out")
    want = by_the_specification(loaded.state_dict(), loaded.config, tokens[0])
    assert ((loaded(tokens)[0].detach() - want).abs().max() / want.std()).item() < 1e-4
    with pytest.raises(UserError, match=r"\(50\) is not a multiple of 32"):
        save_release(model, tmp_path / "int4", "int4")
    config_file = tmp_path / "out/config.json"
    config_file.write_text(json.dumps(json.loads(config_file.read_text()) | {"quantization": QUANTIZATION}))
    with pytest.raises(UserError, match=r"model.hidden_size \(50\) must be a multiple of 32, the int4 group"):
        load_release(tmp_path / "out")


@pytest.mark.slow  # 7 GB of memory, two minutes
def test_a_release_of_s_is_as_long_as_the_published_file(tmp_path):
    shape = config.load(["configs/model/s.yaml"], check=lambda _: None).model
    model = MobileMoE(shape)
    model.init_weights(0)
    (file,) = save_release(model, tmp_path / "out", "int4")
    size = file.stat().st_size
    file.unlink()
    assert size == 713_916_240


def test_codes_and_scales_are_those_of_training_bit_for_bit(model, tmp_path):
    """bf16 -> int4 -> load: what is stored is quantise() of the bf16 values, what is loaded their fake-quantisation."""
    save_release(model, tmp_path / "bf16", "bf16")
    plain = load_release(tmp_path / "bf16")
    (file,) = save_release(plain, tmp_path / "int4", "int4")
    stored, loaded = load_file(file), dict(load_release(tmp_path / "int4").named_parameters())
    checked = 0
    for name, weight in plain.named_parameters():
        if weight.ndim > 1 and "router" not in name:
            codes, scales = quantise(weight)
            code_name, scale_name = int4_names(name)
            assert torch.equal(unpack(stored[code_name]), codes), name
            assert torch.equal(stored[scale_name], scales), name
            assert torch.equal(loaded[name], fake_quantise(weight)), name
            checked += 1
    assert checked == 1 + 2 * (4 + 2 + 3)


def test_an_int4_release_that_is_loaded_and_saved_keeps_every_byte(model, tmp_path):
    (first,) = save_release(model, tmp_path / "first", "int4")
    again = load_release(tmp_path / "first")
    (second,) = save_release(again, tmp_path / "second", "int4")
    assert second.read_bytes() == first.read_bytes()
    (narrow,) = save_release(load_release(tmp_path / "first", torch.bfloat16), tmp_path / "narrow", "int4")
    assert narrow.read_bytes() == first.read_bytes()
    # A weight that has been changed since is quantised anew.
    with torch.no_grad():
        again.model.layers[0].self_attn.q_proj.weight *= 1.1
    (third,) = save_release(again, tmp_path / "third", "int4")
    name = "model.layers.0.self_attn.q_proj."
    codes, scales = quantise(again.model.layers[0].self_attn.q_proj.weight)
    assert torch.equal(load_file(third)[name + "weight_scale"], scales)
    assert torch.equal(unpack(load_file(third)[name + "qweight"]), codes)


def test_a_second_save_is_byte_identical_and_replaces_the_first(model, tmp_path):
    (file,) = save_release(model, tmp_path / "out", "int4")
    first = file.read_bytes()
    save_release(model, tmp_path / "out", "int4")
    assert file.read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_shards_hold_what_one_file_holds(model, tmp_path, format):
    (whole,) = save_release(model, tmp_path / "whole", format)
    files = save_release(model, tmp_path / "shards", format, max_shard_bytes=20_000)
    assert len(files) > 3
    assert all(file.stat().st_size < 25_000 or len(load_file(file)) <= 2 for file in files)
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    for name, tensor in load_file(whole).items():
        assert torch.equal(tensors.pop(name), tensor), name
    assert tensors == {}
    index = json.loads((tmp_path / "shards/model.safetensors.index.json").read_text())
    assert sorted(set(index["weight_map"].values())) == [file.name for file in files]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in load_file(whole).values())
    loaded = load_release(tmp_path / "shards")
    for name, value in load_release(tmp_path / "whole").state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_folder_that_is_something_else_is_left_alone(model, tmp_path):
    (tmp_path / "thesis.tex").write_text("do not lose me")
    with pytest.raises(UserError, match="exists and was not written by this project"):
        save_release(model, tmp_path, "int4")
    assert (tmp_path / "thesis.tex").exists()


def test_somebody_elses_checkpoint_is_left_alone(model, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "mobilemoe"}')
    with pytest.raises(UserError, match="was not written by this project"):
        save_release(model, tmp_path, "int4")
    with pytest.raises(UserError, match="was not written by this project"):
        save_release(model, tmp_path / "config.json", "int4")


def test_neighbours_and_additions_of_the_user_survive(model, tmp_path):
    for name in ("out.old", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "thesis.tex").write_text("do not lose me")
    save_release(model, tmp_path / "out", "int4")
    save_release(model, tmp_path / "out", "int4")
    (tmp_path / "out" / "eval").mkdir()
    with pytest.raises(UserError, match=r"out/eval exists and was not written by this project"):
        save_release(model, tmp_path / "out", "int4")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "out.old", "out.partial"]
    assert all((tmp_path / name / "thesis.tex").exists() for name in ("out.old", "out.partial"))


def test_a_failure_leaves_the_release_that_was_there(model, tmp_path, monkeypatch):
    (file,) = save_release(model, tmp_path / "out", "int4")
    before = file.read_bytes()

    def fail(*args, **options):
        raise OSError(28, "No space left on device")

    for module, name in ((output_folder, "publish"), (release, "sync")):
        monkeypatch.setattr(module, name, fail)
        with pytest.raises(UserError, match=r"cannot write the release to .*: No space left on device"):
            save_release(model, tmp_path / "out", "bf16")
        assert file.read_bytes() == before
        assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_save_that_was_killed_leaves_nothing_behind_and_loses_nothing(model, tmp_path):
    (file,) = save_release(model, tmp_path / "out", "int4")
    before, scratch = file.read_bytes(), tmp_path / ".out.mobilemoe-partial"
    # Killed between moving the earlier release away and moving the new one in.
    (scratch / "new").mkdir(parents=True)
    (tmp_path / "out").rename(scratch / "old")
    with pytest.raises(UserError, match="unknown release format"):
        save_release(model, tmp_path / "out", "int8")
    with torch.no_grad():
        model.model.norm.weight[0] = float("nan")
    with pytest.raises(UserError, match="NaN"):
        save_release(model, tmp_path / "out", "bf16")
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_a_link_and_the_present_folder_are_places_too(model, tmp_path, monkeypatch):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    for _ in range(2):
        save_release(model, tmp_path / "link", "bf16")
    assert (tmp_path / "link").is_symlink()
    assert load_release(tmp_path / "disk").config.name == "small"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    save_release(model, ".", "bf16")
    assert (tmp_path / "here/model.safetensors").exists()


def test_expert_tensors_may_carry_a_weight_suffix(model, tmp_path):
    (file,) = save_release(model, tmp_path / "out", "bf16")
    want = load_release(tmp_path / "out").state_dict()
    tensors = {k + ".weight" if k.endswith("_proj") else k: v for k, v in load_file(file).items()}
    assert sum(k.endswith("down_proj.weight") and ".experts." in k for k in tensors) == 2
    save_file(tensors, file)
    for name, value in load_release(tmp_path / "out").state_dict().items():
        assert torch.equal(value, want[name]), name


def naive_int4(codes: np.ndarray, scales: np.ndarray) -> torch.Tensor:
    """Section 4 of the specification, byte by byte."""
    out = np.zeros((*codes.shape[:-1], codes.shape[-1] * 2))
    for place in np.ndindex(codes.shape):
        byte = int(codes[place])
        for half, nibble in enumerate((byte & 15, byte >> 4)):
            element = 2 * place[-1] + half
            value = nibble - 16 if nibble > 7 else nibble
            out[(*place[:-1], element)] = value * float(scales[(*place[:-1], element // 32)])
    return torch.from_numpy(out)


@pytest.mark.parametrize("format", ["bf16", "int4"])
@pytest.mark.parametrize("keys", ["published", "as transformers 5 writes them"])
def test_a_folder_from_elsewhere_gives_the_logits_of_the_specification(small_model, tmp_path, format, keys):
    """Random codes, scales and weights, written without save_release."""
    scaling = config.RopeScaling(original_max_position_embeddings=64)
    shape = dataclasses.replace(small_model, vocab_size=64, rope_scaling=scaling)
    rng = np.random.default_rng(0)
    tensors, state = {}, {}
    for name, tensor in MobileMoE(shape).state_dict().items():
        size = tuple(tensor.shape)
        if "norm" in name or "expert_bias" in name:
            tensors[name] = torch.from_numpy(rng.normal("norm" in name, 0.3, size)).bfloat16()
        elif "router" in name or format == "bf16":
            tensors[name] = torch.from_numpy(rng.normal(0, 0.2, size)).bfloat16()
        else:
            codes = rng.integers(0, 256, (*size[:-1], size[-1] // 2), dtype=np.uint8)
            scales = rng.uniform(0.001, 0.06, (*size[:-1], size[-1] // 32)).astype(np.float16)
            code_name, scale_name = int4_names(name)
            tensors[code_name], tensors[scale_name] = torch.from_numpy(codes), torch.from_numpy(scales)
            state[name] = naive_int4(codes, scales)
        state.setdefault(name, tensors.get(name))
    values = {"model_type": "mobilemoe", "architectures": ["MobileMoEForCausalLM"], "transformers_version": "9"}
    values |= {k: v for k, v in dataclasses.asdict(shape).items() if k not in ("name", "initializer_range")}
    if keys != "published":
        values["rope_parameters"] = values.pop("rope_scaling") | {"rope_theta": values.pop("rope_theta")}
    if format == "int4":
        values["quantization"] = QUANTIZATION
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(tensors, tmp_path / "model.safetensors")

    tokens = torch.randint(0, 64, (1, 100), generator=torch.Generator().manual_seed(0))
    want = by_the_specification(state, shape, tokens[0])
    got = load_release(tmp_path)(tokens)[0].detach()
    assert ((got - want).abs().max() / want.std()).item() < 1e-4


@pytest.mark.parametrize("format", ["bf16", "int4"])
def test_sixteen_bits_save_memory_and_change_little(model, tmp_path, format):
    save_release(model, tmp_path / "out", format)
    narrow, wide = load_release(tmp_path / "out", torch.bfloat16), load_release(tmp_path / "out")
    for name, parameter in narrow.named_parameters():
        full = parameter.ndim == 1 or "router" in name
        assert parameter.dtype == (torch.float32 if full else torch.bfloat16), name
        torch.testing.assert_close(parameter.float(), wide.state_dict()[name], rtol=2**-8, atol=0, msg=name)
    for count in (4, 40):  # few rows meet the weights in 16 bits, many in float32
        tokens = torch.randint(0, 512, (1, count))
        assert (narrow(tokens) - wide(tokens)).abs().max() < 0.05 * wide(tokens).std()
    (again,) = save_release(narrow, tmp_path / "again", format)
    assert again.read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_other_dtypes_are_refused(model, tmp_path):
    save_release(model, tmp_path / "out", "bf16")
    with pytest.raises(UserError, match=r"float32, bfloat16 or float16, not torch.float64"):
        load_release(tmp_path / "out", torch.float64)
