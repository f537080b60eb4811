import numpy as np
import pytest
import torch

from mm_train.data import collate, open_sources
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.routing_record import RoutingRecord, changed
from mm_train.tokenizer import load_tokenizer
from mm_train.validate import validate


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model)
    model.init_weights(0)
    return model.eval()


def record(model, data_set, rows):
    readers = open_sources(data_set, ["code"], "val", 64)
    with RoutingRecord(model) as found:
        validate(model, readers, load_tokenizer(data_set).token_bytes(), 64, rows, Groups(), seen=found.keep)
    return found.choices, readers["code"].num_windows(64)


def test_every_token_counts_once_however_rows_are_batched(model, data_set, small_model):
    """Rows beyond the end of the last batch are not counted."""
    choices, windows = record(model, data_set, 1)
    assert windows % 4  # so that a batch of four has such rows
    assert [layer.shape for layer in choices] == [(windows * 64, 2)] * 2
    other, _ = record(model, data_set, 4)
    for a, b in zip(choices, other, strict=True):
        assert (np.sort(a) == np.sort(b)).mean() > 0.999  # sums of other batches differ in their last bit


def test_the_choices_are_those_of_the_layer(model, data_set, small_model):
    choices, _ = record(model, data_set, 1)
    counts = torch.stack([torch.from_numpy(layer.astype(int)).flatten().bincount(minlength=8) for layer in choices])
    reader = open_sources(data_set, ["code"], "val", 64)["code"]
    wanted = 0
    with torch.no_grad():
        for window in range(reader.num_windows(64)):
            batch = collate([reader.row(window, 64)])
            wanted = wanted + model.losses(batch.tokens_BT, batch.labels_BT, batch.document_BT).counts_LE
    assert torch.equal(counts, wanted)


def test_the_hooks_are_gone_afterwards(model, data_set):
    record(model, data_set, 1)
    assert not any(layer.router._forward_hooks for layer in model.moe_layers())


def test_the_share_that_changed_is_of_choices_not_of_places():
    before = [np.array([[1, 2], [3, 4]]), np.array([[1, 2], [3, 4]])]
    after = [np.array([[2, 1], [3, 4]]), np.array([[1, 5], [6, 7]])]
    assert changed(before, after) == [0, 0.75]
    assert changed(before, before) == [0, 0]
