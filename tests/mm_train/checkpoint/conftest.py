"""A saved engine, and a state to compare with, for all tests of checkpoints."""

from pathlib import Path

import pytest
import torch

from mm_train import config
from mm_train.checkpoint.writer import Writer
from mm_train.engine import PlainEngine
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import FACTS


@pytest.fixture
def facts() -> dict:
    return FACTS


@pytest.fixture
def engine(small_config) -> PlainEngine:
    """An engine with moments that are not zero."""
    torch.manual_seed(0)
    model = MobileMoE(small_config.model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    engine = PlainEngine(model, small_config.optim)
    for _ in range(2):
        model(torch.randint(0, 512, (2, 16))).square().mean().backward()
        engine.step(1e-3)
    for layer in model.moe_layers():
        layer.expert_bias += 0.25
    return engine


@pytest.fixture
def synchronous(small_config) -> config.Config:
    small_config.checkpoint.asynchronous = False
    return small_config


@pytest.fixture
def run(engine, synchronous, tmp_path) -> Path:
    """A run with checkpoints of steps 1, 2 and 3, of which the weights differ."""
    folder = tmp_path / "saved"
    synchronous.checkpoint.keep = 3
    writer = Writer(folder, Groups(), synchronous)
    for step in (1, 2, 3):
        with torch.no_grad():
            for parameter in engine.model.parameters():
                parameter += 1
        writer.save(step, engine, FACTS | {"samples": 8 * step})
    return folder
