import dataclasses

import pytest
import torch

from mm_train import config
from mm_train.cli import UserError
from mm_train.parallel.groups import Groups, init_groups
from mm_train.sharding import ALONE


@pytest.mark.parametrize(
    ("world", "layout", "message"),
    [
        ("6", {"expert_parallel": 4}, r"expert_parallel \(4\) must divide the number of processes \(6\)$"),
        ("6", {"tensor_parallel": 4}, r"tensor_parallel \(4\) must divide the number of processes \(6\)$"),
        (
            "4",
            {"tensor_parallel": 2, "expert_parallel": 4},
            r"expert_parallel \(4\) must divide the number of processes \(4\) / tensor_parallel \(2\)",
        ),
        ("6", {"engine": "plain"}, r"plain runs on one process; there are 6"),
        ("many", {}, r"WORLD_SIZE in the environment is 'many'; it must be a whole number"),
    ],
)
def test_a_world_that_does_not_fit_is_refused(monkeypatch, world, layout, message):
    monkeypatch.setenv("WORLD_SIZE", world)
    with pytest.raises(UserError, match=message):
        init_groups(config.Parallel(**layout))


def test_one_process_needs_no_process_group():
    groups = init_groups(dataclasses.replace(config.Parallel(), engine="auto"))
    assert (groups.rank, groups.world, groups.ep, groups.tp, groups.place) == (0, 1, None, None, ALONE)
    assert groups.expert_dp == (0, 1)


def test_alone_every_sum_is_its_own():
    groups, value = Groups(), torch.tensor([1.0, 2.0])
    assert torch.equal(groups.sum(value), value)
    assert torch.equal(groups.total(value), value)
    assert groups.gather({"a": 1}) == [{"a": 1}]
