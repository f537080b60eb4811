import math

import pytest

from mm_train.log_lines import clock, load_factors, load_spread, short, train_line


def test_a_line_says_nan_and_leaves_out_what_was_not_measured():
    assert train_line({"step": 3, "loss": math.nan, "lr": None}, {}) == "step 3  loss nan"


def test_load_factors():
    assert load_factors(None) == []
    assert load_factors([[0.25] * 4, [0.0, 0.0], [None, math.nan], [1.0, 0.0, 0.0, 0.0]]) == [1.0, 0.0, 0.0, 4.0]


def test_load_spread():
    assert load_spread([[3, 1], [0, 0]]) == {"load_max": [1.5, 0.0], "load_min": [0.5, 0.0], "load_cv": [0.5, 0.0]}
    assert load_spread(None) == {"load_max": [], "load_min": [], "load_cv": []}


@pytest.mark.parametrize(
    ("memory", "shown"),
    [
        (1.5, "  mem 1.5 GiB"),  # as earlier versions wrote it
        ({"host": 1.5}, "  mem 1.5 GiB"),
        ({"host": 1.5, "device": 70.0, "device_reserved": 75.0}, "  mem 70.0 GiB"),
        ({}, ""),
        (None, ""),
    ],
)
def test_memory_is_that_of_the_gpu_if_there_is_one(memory, shown):
    assert train_line({"step": 3, "memory_gib": memory}, {}) == f"step 3{shown}"


def test_dead_experts_are_shown_when_there_are_any():
    assert train_line({"step": 3, "dead_experts": 0}, {}) == "step 3"
    assert train_line({"step": 3, "dead_experts": 2}, {}) == "step 3  dead 2"


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, None), (7, "7"), (983, "983"), (9834, "9.83k"), (999_600, "1M"), (1_263_374_256, "1.26B"), (6e12, "6T")],
)
def test_short(value, text):
    assert short(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(12.4, "00:12"), (3599.6, "1:00:00"), (3725, "1:02:05"), (200_000, "2d 7:33:20")]
)
def test_clock(seconds, text):
    assert clock(seconds) == text
