"""The tensor list against the published counts. That it lists the modules' tensors is in test_model.py."""

from pathlib import Path

import pytest

from mm_train import config
from mm_train.inventory import PARTS, active_parameters, parameters, tensors
from mm_train.model import MobileMoE
from mm_train.release_format import file_bytes
from mm_train.rules import validate_model

ROOT = Path(__file__).parents[2]
PUBLISHED = {  # total, active, bytes of the int4 file: arXiv 2605.27358 and the released checkpoints
    "s": (1_263_374_256, 272_469_936, 713_916_240),
    "m": (2_818_390_552, 528_300_568, 1_590_986_088),
    "l": (5_325_704_320, 921_685_120, 3_004_365_448),
}


def load(name: str) -> config.Model:
    return config.load([ROOT / f"configs/model/{name}.yaml"], check=lambda c: validate_model(c.model)).model


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_are_met_exactly(size):
    model = load(size)
    counts = (sum(parameters(model).values()), sum(active_parameters(model).values()), file_bytes(model, "int4"))
    assert counts == PUBLISHED[size]


def test_parameters_come_in_the_modules_order(small_model):
    """DeepSpeed cuts them in this order (mm_train.memory)."""
    listed = [entry.name for entry in tensors(small_model) if not entry.name.endswith("expert_bias")]
    assert listed == [name for name, _ in MobileMoE(small_model).named_parameters()]


def test_a_token_meets_its_experts_only(small_model):
    total, active = parameters(small_model), active_parameters(small_model)
    assert list(total) == [part for part in PARTS if part in total]
    share = small_model.num_experts_per_tok / small_model.num_local_experts
    assert active["routed experts"] == total["routed experts"] * share
    assert {part for part in total if active[part] != total[part]} == {"routed experts"}


def test_a_dense_network_is_active_as_a_whole():
    model = load("mobilellm-pro")
    assert parameters(model) == active_parameters(model)
    assert sum(parameters(model).values()) == 1_084_453_120
    assert "router" not in parameters(model)
