"""A small network of every kind that has a GGUF."""

import textwrap
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_prep.train_bpe import train_bpe
from mm_train import config
from mm_train.model import MobileMoE
from mm_train.release import load_release, save_release
from mm_train.tokenizer import Tokenizer


def network(vocab_size: int, **changes) -> MobileMoE:
    """Random weights, none of them at a value that could hide a mistake; logits vary by a nat or two."""
    shape = config.Model(
        name="small",
        vocab_size=vocab_size,
        hidden_size=64,
        intermediate_size=32,
        intermediate_size_mlp=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=6,
        num_experts_per_tok=2,
        initializer_range=0.15,
        max_position_embeddings=1024,
    )
    model = MobileMoE(replace(shape, **changes)).eval()
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name.endswith(("norm.weight", "expert_bias")):
                tensor += 0.2 * torch.randn(tensor.shape, generator=generator)
    return model


DENSE = {"num_local_experts": 0, "num_experts_per_tok": 0, "intermediate_size": 0}
# A switch between the 64th and the 128th position, where the frequencies of a head of 32 lie on both sides.
SCALED = {"rope_theta": 10000.0, "rope_scaling": config.RopeScaling(16.0, 128, 1.0, 1.0)}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    """A small one with merges: llama.cpp refuses a vocabulary that has none."""
    text = Path(textwrap.__file__).read_text()
    return train_bpe([text], 512)


@pytest.fixture(params=[{}, DENSE, SCALED, {"scoring_func": "softmax"}], ids=["moe", "dense", "scaled", "softmax"])
def release(request, tmp_path, tokenizer):
    """(network, its bf16 release folder); the network has the values of the release."""
    save_release(network(tokenizer.vocab_size, **request.param), tmp_path / "release", "bf16", tokenizer)
    return load_release(tmp_path / "release"), tmp_path / "release"
