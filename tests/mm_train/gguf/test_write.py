"""GGUF files in llama.cpp against the network they were written from."""

import numpy as np
import pytest
import torch

from mm_train import config
from mm_train.cli import UserError
from mm_train.export.runtimes import Ours
from mm_train.export.source import ExportSource
from mm_train.gguf import layout, write
from mm_train.gguf.int4 import int4_tensors
from mm_train.gguf.write import expected_bytes, rope_order

pytest.importorskip("gguf")
pytest.importorskip("xllamacpp")

TEXT = "def route(x):\n    # which experts?\n    return scores.topk(4)\n" * 6


def llama_cpp(path, **options):
    from mm_train.gguf.runtime import LlamaCpp

    return LlamaCpp(path, context=512, exact=True, **options)


def test_llama_cpp_computes_the_same_network(release, tokenizer, tmp_path):
    model, folder = release
    write.write(tmp_path / "m.gguf", ExportSource(folder), tokenizer, {"name": "small"}, as_float32=True)
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    positions = [0, 1, 7, 63, 64, 65, 127, 128, 200, len(tokens) - 1]
    theirs = llama_cpp(tmp_path / "m.gguf").log_probs(tokens, positions)
    ours = Ours(model).log_probs(tokens, positions)
    assert ours.std() > 0.5
    np.testing.assert_allclose(theirs, ours, atol=1e-3)
    assert llama_cpp(tmp_path / "m.gguf").greedy(tokens[:40], 8) == Ours(model).greedy(tokens[:40], 8)


def test_without_the_flags_a_scaled_network_is_wrong(release, tokenizer, tmp_path, monkeypatch):
    model, folder = release
    if model.config.rope_scaling is None:
        assert layout.rope_flags(model.config) == {}
        return
    assert layout.rope_flags(model.config) == {"yarn-beta-fast": 1.0, "yarn-beta-slow": 1.0}
    monkeypatch.setattr(layout, "rope_flags", lambda model: {})
    write.write(tmp_path / "m.gguf", ExportSource(folder), tokenizer, {}, as_float32=True)
    tokens = [tokenizer.bos_id, *tokenizer.encode(TEXT)]
    positions = [len(tokens) - 1]
    theirs = llama_cpp(tmp_path / "m.gguf").log_probs(tokens, positions)
    assert np.abs(theirs - Ours(model).log_probs(tokens, positions)).max() > 0.01


def test_codes_and_scales_are_those_of_the_network(release, tokenizer, tmp_path):
    model, folder = release
    source = ExportSource(folder)
    write.write(tmp_path / "m.gguf", source, tokenizer, {})
    assert source.errors == {}
    found = list(int4_tensors(tmp_path / "m.gguf", model.config))
    assert len(found) == sum(tensor.quantised for tensor in layout.tensors(model.config))
    for name, codes, scales, axis in found:
        expected = source.int4(name, axis)
        assert torch.equal(codes, expected[0]), name
        assert torch.equal(scales, expected[1]), name
    overhead = (tmp_path / "m.gguf").stat().st_size - expected_bytes(model.config)
    assert 0 < overhead < 60_000  # keys and vocabulary


def test_the_tokenizer_is_llama_cpps_too(release, tokenizer, tmp_path):
    _, folder = release
    write.write(tmp_path / "m.gguf", ExportSource(folder), tokenizer, {})
    runtime = llama_cpp(tmp_path / "m.gguf")
    text = "héllo <|eot|> don't 1234567  \n\n\tx"
    answer = runtime.complete(text, 1)
    # One token more than ours: BOS, which llama.cpp puts before a text as the file says. llama.cpp finds control
    # strings in text, so a text without one is compared.
    plain = text.replace("<|eot|>", "eot")
    assert runtime.complete(plain, 1)["usage"]["prompt_tokens"] == 1 + len(tokenizer.encode(plain))
    assert answer["usage"]["prompt_tokens"] > 0


def test_rope_order_turns_adjacent_pairs_into_halves():
    rows = torch.arange(8)[:, None]
    assert rope_order(rows, 4).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"intermediate_size_mlp": 0}, "has no shared expert"),
        ({"rope_scaling": config.RopeScaling(8.0, 64, 1.0, 4.0)}, "low_freq_factor 1 and high_freq_factor 4"),
    ],
)
def test_networks_that_llama_cpp_has_not(changes, message, tokenizer, tmp_path):
    from mm_train.release import save_release
    from tests.mm_train.gguf.conftest import network

    save_release(network(tokenizer.vocab_size, **changes), tmp_path / "r", "bf16", tokenizer)
    with pytest.raises(UserError, match=message):
        write.write(tmp_path / "m.gguf", ExportSource(tmp_path / "r"), tokenizer, {})
