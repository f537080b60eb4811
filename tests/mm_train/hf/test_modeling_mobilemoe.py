import json
import warnings

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from mm_train.hf import modeling_mobilemoe
from mm_train.hf.configuration_mobilemoe import MobileMoEConfig
from mm_train.hf.modeling_mobilemoe import MobileMoEForCausalLM, MobileMoEModel, MobileMoESparse, visible_keys
from mm_train.release import load_release


def load(folder, dtype=torch.float32) -> MobileMoEForCausalLM:
    return MobileMoEForCausalLM.from_pretrained(folder, dtype=dtype)


@torch.no_grad()
def distance(logits, want) -> float:
    """Largest difference, in standard deviations of the logits."""
    return float((logits - want).abs().max() / want.std())


@torch.no_grad()
def test_logits_are_those_of_the_trainer(release, variant, format, tokens_BT):
    folder = release(format, variant)
    want = load_release(folder)(tokens_BT)
    assert distance(load(folder)(tokens_BT).logits, want) < 1e-4


@torch.no_grad()
def test_one_grouped_matmul_gives_what_the_loop_over_experts_gives(release, format, tokens_BT, monkeypatch):
    model = load(release(format))
    want = model(tokens_BT).logits
    monkeypatch.setattr(modeling_mobilemoe, "_has_grouped_mm", lambda x: True)  # as on a GPU
    assert distance(model(tokens_BT).logits, want) < 1e-4


@torch.no_grad()
def test_left_and_right_padding_change_nothing(release, tokens_BT):
    model = load(release("bf16"))
    want = model(tokens_BT).logits
    for pad_left, pad_right in ((7, 0), (0, 7), (3, 4)):
        padded, mask = (F.pad(t, (pad_left, pad_right), value=0) for t in (tokens_BT, torch.ones_like(tokens_BT)))
        logits = model(padded, attention_mask=mask).logits
        assert torch.isfinite(logits).all()
        assert distance(logits[:, pad_left : pad_left + 80], want) < 1e-4


@torch.no_grad()
def test_a_cache_changes_nothing_however_the_tokens_come(release, tokens_BT):
    model = load(release("bf16"))
    cache, logits = None, []
    for part in tokens_BT.split([40, 1, 6, 1, 32], dim=1):
        output = model(part, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        logits.append(output.logits)
    assert cache.get_seq_length() == 80
    assert distance(torch.cat(logits, 1), model(tokens_BT).logits) < 1e-4


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate_gives_each_padded_row_what_it_gets_alone(release, prompts, greedy, byte_tokenizer, options):
    folder = release("bf16")
    model, trainers = load(folder), load_release(folder)
    want = [greedy(trainers, prompt, 12) for prompt in prompts]
    longest = max(map(len, prompts))
    pads = [longest - len(prompt) for prompt in prompts]
    ids = torch.tensor([[byte_tokenizer.pad_id] * n + p for n, p in zip(pads, prompts, strict=True)])
    mask = torch.tensor([[0] * n + [1] * (longest - n) for n in pads])
    options = {"max_new_tokens": 12, "do_sample": False, "eos_token_id": None, **options}
    assert model.generate(ids, attention_mask=mask, **options)[:, longest:].tolist() == want
    assert model.generate(torch.tensor([prompts[1]]), **options)[0, len(prompts[1]) :].tolist() == want[1]


def test_generate_stops_where_the_folder_says(release, prompts, byte_tokenizer):
    model = load(release("bf16"))
    assert model.generation_config.eos_token_id == list(byte_tokenizer.stop_ids)
    assert model.generation_config.pad_token_id == byte_tokenizer.pad_id
    free = model.generate(torch.tensor([prompts[0]]), max_new_tokens=5, eos_token_id=None, do_sample=False)
    stop = int(free[0, len(prompts[0]) + 2])
    stopped = model.generate(torch.tensor([prompts[0]]), max_new_tokens=5, eos_token_id=[9999, stop], do_sample=False)
    assert stopped[0].tolist() == free[0, : free[0].tolist().index(stop, len(prompts[0])) + 1].tolist()


def test_int4_becomes_the_values_of_the_trainer_rounded_once(release):
    folder = release("int4")
    want = load_release(folder).state_dict()
    model = load(folder, torch.bfloat16)
    got = model.state_dict()
    assert got.keys() == want.keys()
    for name, value in want.items():
        exact = name.endswith(("router.weight", "expert_bias"))
        assert torch.equal(got[name], value if exact else value.bfloat16()), name
    assert model.config.quantization is None


def test_int4_that_would_be_offloaded_is_refused(release, tmp_path):
    pytest.importorskip("accelerate", reason="the eval extra is not installed")
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu"}
    with pytest.raises(ValueError, match="an int4 release cannot be offloaded"):
        MobileMoEForCausalLM.from_pretrained(release("int4"), device_map=places, offload_folder=tmp_path)


def test_another_order_of_files_is_the_same_model(release, format):
    whole = load(release(format)).state_dict()
    folder = release(format, max_shard_bytes=20_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 2
    sharded = load(folder).state_dict()
    assert all(torch.equal(sharded[name], value) for name, value in whole.items())


def test_loading_finds_every_tensor_and_has_nothing_to_say(release, variant, format, capfd):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _, info = MobileMoEForCausalLM.from_pretrained(release(format, variant), output_loading_info=True)
    assert not any(info.values()), info
    lines = capfd.readouterr().err.replace("\r", "\n").splitlines()
    assert [line for line in lines if line and "Loading weights" not in line] == []


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_transformers_saves_both_can_load(release, variant, format, dtype, tokens_BT, tmp_path):
    model = load(release(format, variant), dtype)
    model.save_pretrained(tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    values = json.loads((tmp_path / "config.json").read_text())
    assert (values.get("quantization"), values["architectures"]) == (None, ["MobileMoEForCausalLM"])
    again = load(tmp_path, dtype)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in again.state_dict().items())
    if dtype == torch.bfloat16:  # the release format keeps norms in bfloat16
        assert distance(load_release(tmp_path)(tokens_BT), load(tmp_path)(tokens_BT).logits) < 1e-4


def test_the_base_model_loads_alone(release, format, tokens_BT):
    folder = release(format)
    base = MobileMoEModel.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        assert torch.equal(base(tokens_BT).last_hidden_state, load(folder).model(tokens_BT).last_hidden_state)


def test_the_loss_shifts_labels_and_reaches_every_weight(release, variant, tokens_BT):
    model = load(release("bf16", variant))
    labels = tokens_BT.masked_fill(tokens_BT < 40, -100)
    output = model(tokens_BT, labels=labels)
    want = F.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    torch.testing.assert_close(output.loss, want)
    output.loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@torch.no_grad()
def test_only_the_logits_that_are_asked_for(release, tokens_BT):
    model = load(release("bf16"))
    full = model(tokens_BT).logits
    torch.testing.assert_close(model(tokens_BT, logits_to_keep=3).logits, full[:, -3:])
    torch.testing.assert_close(model(tokens_BT, logits_to_keep=torch.tensor([5, 1])).logits, full[:, [5, 1]])


@torch.no_grad()
def test_other_outputs(release, tokens_BT):
    model = load(release("bf16"))
    output = model(tokens_BT, output_hidden_states=True)
    assert len(output.hidden_states) == 3
    torch.testing.assert_close(F.linear(output.hidden_states[-1], model.get_input_embeddings().weight), output.logits)
    embeddings = model.get_input_embeddings()(tokens_BT)
    torch.testing.assert_close(model(inputs_embeds=embeddings).logits, output.logits)
    logits, cache = model(tokens_BT, return_dict=False)
    assert torch.equal(logits, output.logits)
    assert cache.get_seq_length() == 80
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model(tokens_BT, inputs_embeds=embeddings)


def test_of_equal_experts_the_lower_id_wins_and_the_bias_only_chooses():
    config = MobileMoEConfig(hidden_size=32, intermediate_size=32, num_local_experts=60, num_experts_per_tok=4)
    layer = MobileMoESparse(config)
    torch.nn.init.zeros_(layer.router.weight)
    x_ND = torch.randn(5, 32)
    ids, weights = layer.route(x_ND)
    assert ids.tolist() == [[0, 1, 2, 3]] * 5
    torch.testing.assert_close(weights, torch.full((5, 4), 2.5 / 4))
    layer.expert_bias[[7, 50]] = torch.tensor([0.1, 0.2])
    ids, weights = layer.route(x_ND)
    assert ids.tolist() == [[50, 7, 0, 1]] * 5
    torch.testing.assert_close(weights, torch.full((5, 4), 2.5 / 4))


def test_a_mask_that_is_too_short_is_refused(release, tokens_BT):
    model = load(release("bf16"))
    cache = model(tokens_BT).past_key_values
    with pytest.raises(ValueError, match="attention_mask covers 1 tokens; cached and new ones are 81"):
        model(tokens_BT[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_who_sees_whom():
    cpu = torch.device("cpu")
    assert visible_keys(None, 0, 5, cpu) is None
    assert visible_keys(torch.ones(2, 6), 5, 1, cpu) is None
    after_a_cache = visible_keys(torch.ones(2, 4), 2, 2, cpu)
    assert after_a_cache[0, 0].tolist() == [[True, True, True, False], [True, True, True, True]]
    # Padding sees itself: a softmax over nothing would be NaN on some devices.
    left = visible_keys(torch.tensor([[0, 0, 1, 1]]), 0, 4, cpu)
    assert left[0, 0].int().tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 1, 1]]
    ready = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    assert visible_keys(ready, 0, 2, cpu) is ready


def test_a_cache_under_a_name_that_is_not_known_is_an_error_and_not_lost():
    from transformers.cache_utils import DynamicCache

    cache = DynamicCache()
    assert modeling_mobilemoe.the_cache(cache, None, {}) is cache
    assert modeling_mobilemoe.the_cache(None, cache, {"loss": 1}) is cache
    with pytest.raises(TypeError, match="'memory'"):
        modeling_mobilemoe.the_cache(None, None, {"memory": cache})
