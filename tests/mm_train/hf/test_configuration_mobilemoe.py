import json

import pytest

from mm_train import release_format
from mm_train.hf.configuration_mobilemoe import INT4_LAYOUT, MobileMoEConfig

ROPE = {
    "rope_type": "llama3",
    "factor": 16.0,
    "original_max_position_embeddings": 64,
    "low_freq_factor": 1.0,
    "high_freq_factor": 1.0,
}


def test_what_a_release_says_survives_transformers(release, format, tmp_path, capfd):
    folder = release(format)
    MobileMoEConfig.from_pretrained(folder).save_pretrained(tmp_path)
    before, after = (json.loads((path / "config.json").read_text()) for path in (folder, tmp_path))
    before["dtype"] = before.pop("torch_dtype")
    assert {key: after.get(key) for key in before} == before
    assert after["rope_scaling"] == ROPE
    assert after["scoring_func"] == "sigmoid"
    assert capfd.readouterr() == ("", "")  # nothing to complain about, equal factors included


def test_a_config_that_transformers_wrote_in_its_own_way_is_understood():
    loaded = MobileMoEConfig(rope_parameters={"rope_theta": 10000.0, **ROPE})
    assert (loaded.rope_theta, loaded.rope_scaling) == (10000.0, ROPE)
    loaded = MobileMoEConfig(rope_parameters={"rope_theta": 10000.0, "rope_type": "default"})
    assert (loaded.rope_theta, loaded.rope_scaling) == (10000.0, None)


def test_the_int4_layout_is_that_of_the_release_format():
    assert INT4_LAYOUT == release_format.QUANTIZATION


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"rope_theta": 1.0, "rope_parameters": {"rope_theta": 2.0}}, "contradicts rope_theta 1.0"),
        ({"rope_scaling": ROPE, "rope_parameters": {"rope_type": "default"}}, "contradicts rope_theta"),
        (
            {"quantization": {k: v for k, v in INT4_LAYOUT.items() if k != "packed"}},
            "quantization.packed is None; this code reads True",
        ),
        ({"quantization": {"format": "gptq"}}, "quantization.format is 'gptq'; this code reads 'mobilemoe-int4-g32'"),
        ({"quantization": {"group_size": 32}}, "quantization.format is None"),
        ({"quantization": INT4_LAYOUT | {"group_size": 64}}, "quantization.group_size is 64; this code reads 32"),
        ({"scoring_func": "relu"}, "scoring_func is 'relu'"),
        ({"rope_scaling": {**ROPE, "rope_type": "yarn"}}, "rope_scaling.rope_type is 'yarn'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling lacks original_max_position"),
        ({"attention_bias": True}, "attention_bias is True; this code implements False"),
        ({"no_rope_layers": [1] * 19 + [0]}, "no_rope_layers is"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
    ],
)
def test_what_the_code_does_not_implement_is_refused(values, message):
    with pytest.raises(ValueError, match=message):
        MobileMoEConfig(**values)
