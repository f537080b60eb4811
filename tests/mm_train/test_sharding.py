"""What ranks hold: together every tensor once, and the same as the modules that are built for it."""

from itertools import product

import pytest
import torch

from mm_train import inventory
from mm_train.sharding import Place, local_box, local_boxes, tensor_parallel_axis, whole


@pytest.mark.parametrize(("ep", "tp"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 2), (8, 2)])
def test_the_ranks_together_hold_every_element_of_every_tensor(small_model, ep, tp):
    for entry in inventory.tensors(small_model):
        boxes = {local_box(entry, Place(i, ep, j, tp)) for i, j in product(range(ep), range(tp))}
        held = torch.zeros(entry.shape, dtype=torch.int64)
        for box in boxes:
            held[box.slices] += 1
        assert (held == 1).all(), entry.name
        assert sum(box.size for box in boxes) == entry.size


def test_alone_a_rank_holds_everything(small_model):
    assert all(box == whole(entry.shape) for entry, box in local_boxes(small_model, Place()))


def test_experts_are_cut_by_expert_and_dense_tensors_as_megatron_does(small_model):
    axes = {entry.name: tensor_parallel_axis(entry) for entry in inventory.tensors(small_model)}
    layer = "model.layers.0."
    for name in ("self_attn.q_proj", "self_attn.v_proj", "feed_forward.shared_expert.up_proj"):
        assert axes[f"{layer}{name}.weight"] == 0
    for name in ("self_attn.o_proj", "feed_forward.shared_expert.down_proj"):
        assert axes[f"{layer}{name}.weight"] == 1
    assert axes["model.embed_tokens.weight"] == 0
    uncut = ("feed_forward.router.weight", "feed_forward.experts.down_proj", "feed_forward.expert_bias")
    assert all(axes[layer + name] is None for name in (*uncut, "input_layernorm.weight"))


def test_a_cut_that_does_not_come_out_even_is_a_defect(small_model):
    (entry,) = (e for e in inventory.tensors(small_model) if e.name.endswith("0.feed_forward.experts.down_proj"))
    with pytest.raises(AssertionError, match="3 ranks cannot share out axis 0"):
        local_box(entry, Place(0, 3))
