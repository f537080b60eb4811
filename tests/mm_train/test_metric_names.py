import fnmatch

import pytest

from mm_train.metric_names import GROUPS, NAMES, named


def test_the_groups_are_those_of_the_documentation():
    assert set(GROUPS) == {
        *("train", "grad_norm", "router", "experts", "throughput", "time", "data", "memory"),
        *("faults", "validation", "evaluation", "evaluation_bits", "checkpoint"),
    }


def test_a_training_record_is_flat_and_grouped():
    record = {
        "kind": "train",
        "step": 7,
        "loss": 2.0,
        "mfu": None,
        "grad_norm": 1.5,
        "grad_norm_parts": {"attention": 1.0},
        "router_entropy": [0.5, None],
        "phase_seconds": {"data": 0.1},
        "my_own": 3,
        "my_parts": {"a": 1},
        "note": "text is no number",
        "flag": True,
    }
    assert named(record) == {
        "train/loss": 2.0,
        "throughput/mfu": None,
        "grad_norm/total": 1.5,
        "grad_norm/attention": 1.0,
        "router/entropy/layer_00": 0.5,
        "router/entropy/layer_01": None,
        "time/data": 0.1,
        "train/my_own": 3,
        "train/my_parts/a": 1,
    }


def test_a_record_of_an_earlier_version_gets_what_it_lacks():
    record = {"kind": "train", "step": 1, "expert_load": [[0.75, 0.25, 0.0, 0.0]], "memory_gib": 1.5}
    assert named(record) == {
        "experts/load_max/layer_00": 3.0,
        "experts/load_min/layer_00": 0.0,
        "experts/load_cv/layer_00": pytest.approx(1.5**0.5),
        "experts/dead": 2,
        "memory/host": 1.5,
    }


def test_other_kinds_have_what_the_table_says_and_no_more():
    validation = {"kind": "validation", "step": 1, "source": "code", "loss": 2.0, "bytes": 9}
    assert named(validation) == {"validation/code/loss": 2.0}
    assert named({"kind": "skipped", "step": 1, "loss": None, "skipped_steps": 3}) == {"faults/skipped_steps": 3}
    assert named({"kind": "done", "step": 1, "seconds": 3.0}) == {}


def test_no_two_values_of_a_kind_share_a_name():
    for names in NAMES.values():
        assert len(set(names.values())) == len(names)
        exact = [name for name in names.values() if "*" not in name]
        stars = [name for name in names.values() if "*" in name]
        inside = {(name, star) for name in exact for star in stars if fnmatch.fnmatch(name, star)}
        # shown beside their parts on purpose
        assert inside <= {
            *(("time/step", "time/*"), ("time/since_start", "time/*")),
            *(("grad_norm/total", "grad_norm/*"), ("evaluation/average", "evaluation/*")),
        }
