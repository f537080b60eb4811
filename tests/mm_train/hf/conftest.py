"""Release folders with the files that transformers needs, of networks small enough to load in a moment."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers is imported: nothing here may look for a network

from mm_train import config
from mm_train.model import MobileMoE
from mm_train.release import save_release
from mm_train.tokenizer import Tokenizer

# The network itself has MobileMoE's scaling; of its 8 pairs 2 stay and 6 are slowed.
SCALING = config.RopeScaling(original_max_position_embeddings=64)
VARIANTS = {
    "moe": {},
    "plain rope": {"rope_scaling": None},
    "interpolated rope": {"rope_scaling": replace(SCALING, high_freq_factor=4.0)},
    "dense": {"num_local_experts": 0, "num_experts_per_tok": 0},
    "no shared expert": {"intermediate_size_mlp": 0},
    "softmax": {"scoring_func": "softmax"},
    "weights not normalised": {"norm_topk_prob": False},
}


def random_model(shape: config.Model, seed: int = 0) -> MobileMoE:
    """Weights large enough that every part of the network shows in the logits."""
    model = MobileMoE(shape).eval()
    model.init_weights(seed)
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.mul_(20 if "router" in name else 6) if parameter.ndim > 1 else parameter.uniform_(0.5, 1.5)
        for buffer in model.buffers():
            buffer.uniform_(-0.2, 0.2)
    return model


def write_release(
    folder: Path, shape: config.Model, format: str, tokenizer: Tokenizer | None = None, **options: object
) -> Path:
    """A release of random weights as transformers expects it."""
    save_release(random_model(shape), folder, format, tokenizer, **options)
    return folder


@pytest.fixture(scope="session")
def greedy():
    """greedy(model, prompt, length): the likeliest continuation, without a cache and without `generate`."""

    def continuation(model: MobileMoE, prompt: list[int], length: int) -> list[int]:
        ids = list(prompt)
        for _ in range(length):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
        return ids[len(prompt) :]

    return continuation


@pytest.fixture(scope="session")
def shape(small_model) -> config.Model:
    return replace(small_model, rope_scaling=SCALING)


@pytest.fixture(scope="session")
def release(tmp_path_factory, shape, byte_tokenizer):
    """release(format, variant, **options of save_release): a folder, written once."""
    root = tmp_path_factory.mktemp("releases")

    def folder(format: str, variant: str = "moe", **options: object) -> Path:
        path = root / "-".join([variant.replace(" ", "-"), format, *map(str, options)])
        if not path.exists():
            write_release(path, replace(shape, **VARIANTS[variant]), format, byte_tokenizer, **options)
        return path

    return folder


@pytest.fixture(params=VARIANTS)
def variant(request) -> str:
    return request.param


@pytest.fixture(params=["bf16", "int4"])
def format(request) -> str:
    return request.param


@pytest.fixture(scope="session")
def tokens_BT() -> torch.Tensor:
    return torch.randint(0, 256, (2, 80), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="session")
def prompts(tokens_BT) -> list[list[int]]:
    """Of different lengths."""
    return [tokens_BT[0, :17].tolist(), tokens_BT[1, :5].tolist(), tokens_BT[1, 10:40].tolist()]
