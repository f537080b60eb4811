"""Bounds against arithmetic by hand, and against what the paper measured."""

from pathlib import Path

import pytest

from mm_train import config
from mm_train.cli import UserError
from mm_train.rules import validate_model
from mm_train.scaling_law.devices import DEVICES, active_int4_bytes, bounds, find_device

ROOT = Path(__file__).parents[3]
S, M, L = (
    config.load([ROOT / f"configs/model/{n}.yaml"], check=lambda c: validate_model(c.model)).model for n in "sml"
)


def test_active_bytes_are_four_and_a_half_bits_of_the_active_parameters():
    assert active_int4_bytes(S) == pytest.approx(272_469_936 * 4.5 / 8, rel=0.03)  # the router is float32


def test_bounds_by_hand():
    device = find_device(None, 1e9, 1e15)
    bound = bounds(S, device, 256)
    assert bound.decode == pytest.approx(1e9 / (active_int4_bytes(S) + 256 * 10_240))
    assert bound.decode_limit == bound.prefill_limit == "bandwidth"
    assert bound.first_token == pytest.approx(0.7139, rel=1e-2)  # the whole file, once
    slow = bounds(S, find_device(None, 1e15, 1e9), 256)
    assert slow.prefill_limit == slow.decode_limit == "arithmetic"
    assert slow.decode < slow.prefill  # the head works for every token that is decoded
    assert slow.first_token * slow.prefill == pytest.approx(256)


@pytest.mark.parametrize(
    ("model", "device", "short", "long"),
    [  # decoded tokens/s at contexts of 256 and 8k in arXiv 2605.27358
        (S, "galaxy-s25", 138.1, 25.8),
        (M, "galaxy-s25", 83.6, 15.4),
        (L, "galaxy-s25", 53.4, 8.9),
        (S, "iphone-16-pro", 204.6, 32.2),
        (M, "iphone-16-pro", 106.8, 17.2),
        (L, "iphone-16-pro", 59.4, 10.8),
    ],
)
def test_the_paper_stays_below_the_bounds(model, device, short, long):
    assert short < bounds(model, DEVICES[device], 256).decode
    assert long < bounds(model, DEVICES[device], 8192).decode


def test_devices_of_ones_own():
    assert find_device(None, None, None) is None
    assert find_device("raspberry-pi-5", None, None).operations == 614.4e9
    assert find_device("raspberry-pi-5", 9e9, None).bandwidth == 9e9
    with pytest.raises(UserError, match="needs both --bandwidth"):
        find_device(None, 1e9, None)
    with pytest.raises(UserError, match="did you mean galaxy-s25"):
        find_device("galaxy-s26", None, None)
