import math

import pytest

from mm_train.log_lines import clock, load_factors, load_spread, run_line, short, train_line


@pytest.mark.parametrize(
    ("layout", "shown"),
    [
        ({}, "9 steps of 8.19k tokens"),
        ({"world": 1, "zero_stage": 1, "micro_steps": 1}, "1 rank(s), expert parallel 1, 9 steps of 8.19k tokens"),
        (
            {"world": 8, "expert_parallel": 2, "tensor_parallel": 2, "zero_stage": 0, "micro_steps": 4},
            "8 rank(s), expert parallel 2, tensor parallel 2, ZeRO 0, 9 steps of 8.19k tokens in 4 micro-steps",
        ),
    ],
)
def test_the_opening_line_has_the_layout_as_far_as_there_is_one(layout, shown):
    facts = {"stage": "sft", "model": "tiny", "total_steps": 9, "global_batch_tokens": 8192}
    assert run_line(facts | layout) == f"sft: model tiny, {shown}"


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
