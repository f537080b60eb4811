import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_train.cli import UserError
from mm_train.model import MobileMoE
from mm_train.quant import fake_quantise
from mm_train.release import load_model, load_release, save_release


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


def test_a_second_save_is_byte_identical_and_replaces_the_first(model, tmp_path):
    first = save_release(model, tmp_path / "out", "int4").read_bytes()
    assert save_release(model, tmp_path / "out", "int4").read_bytes() == first
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


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


def test_expert_tensors_may_carry_a_weight_suffix(model, tmp_path):
    file = save_release(model, tmp_path / "out", "bf16")
    want = load_release(tmp_path / "out").state_dict()
    tensors = {k + ".weight" if k.endswith("_proj") else k: v for k, v in load_file(file).items()}
    assert sum(k.endswith("down_proj.weight") and ".experts." in k for k in tensors) == 2
    save_file(tensors, file)
    for name, value in load_release(tmp_path / "out").state_dict().items():
        assert torch.equal(value, want[name]), name


def _drop(tensors):
    del tensors["model.norm.weight"]


def _add(tensors):
    tensors["model.extra"] = torch.zeros(1)


def _reshape(tensors):
    tensors["model.norm.weight"] = torch.zeros(3)


def _wrong_scale(tensors):
    tensors["model.embed_tokens.weight_scale"] = torch.zeros(512, 4).half()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_drop, "tensor model.norm.weight is missing"),
        (_add, "unknown tensor model.extra"),
        (_reshape, r"tensor model.norm.weight has shape \(3,\); this model has \(64,\)"),
        (
            _wrong_scale,
            r"tensor model.embed_tokens.weight_scale has shape \(512, 4\); codes \(512, 64\) need \(512, 2\)",
        ),
    ],
)
def test_wrong_tensors_are_refused_by_name(model, tmp_path, change, message):
    file = save_release(model, tmp_path / "out", "int4")
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(UserError, match=message):
        load_release(tmp_path / "out")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "llama", "model_type is 'llama'; it must be 'mobilemoe'"),
        ("quantization", {"format": "gptq"}, "quantization.format is 'gptq'"),
        ("hidden_size", "wide", "hidden_size"),
        ("use_qk_norm", False, "use_qk_norm is False; it must be True"),
        ("no_rope_layers", [1, 0], r"no_rope_layers is \[1, 0\]; it must be \[1, 1\]"),
        ("tie_word_embeddings", False, "tie_word_embeddings is False"),
    ],
)
def test_wrong_config_is_refused_by_key(model, tmp_path, key, value, message):
    save_release(model, tmp_path / "out", "int4")
    config = json.loads((tmp_path / "out/config.json").read_text()) | {key: value}
    (tmp_path / "out/config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        load_release(tmp_path / "out")


def test_damaged_and_missing_files(model, tmp_path):
    file = save_release(model, tmp_path / "out", "int4")
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"model.safetensors is damaged"):
        load_release(tmp_path / "out")
    file.unlink()
    with pytest.raises(UserError, match=r"has no model.safetensors"):
        load_release(tmp_path / "out")
    with pytest.raises(UserError, match=r"not a release folder"):
        load_release(tmp_path)
    with pytest.raises(UserError, match=r"model folder not found"):
        load_model(tmp_path / "none")
