import collections

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cross_entropy import IGNORE
from mm_train.cli import UserError
from mm_train.data import BLOCK, Loader, Mixture, collate, feistel, quotas


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**63))
def test_feistel_is_a_permutation(size, key):
    assert sorted(feistel(i, size, key) for i in range(size)) == list(range(size))


@given(st.dictionaries(st.text(min_size=1), st.floats(0.001, 100), min_size=1, max_size=20))
def test_quotas_add_up_and_are_within_one_of_exact(weights):
    counts = quotas(weights)
    assert sum(counts.values()) == BLOCK
    for name, weight in weights.items():
        assert abs(counts[name] - weight / sum(weights.values()) * BLOCK) < 1


def test_paper_shares_are_exact_in_every_block():
    weights = {"web": 62, "math": 11.6, "code": 10, "knowledge": 10, "science": 6.4}
    mixture = Mixture(weights, dict.fromkeys(weights, 37), seed=3)
    for block in range(3):
        seen = collections.Counter(mixture[k].source for k in range(block * BLOCK, (block + 1) * BLOCK))
        assert seen == {"web": 620, "math": 116, "code": 100, "knowledge": 100, "science": 64}


def test_every_row_once_an_epoch_and_a_new_order_each():
    mixture = Mixture({"a": 1.0}, {"a": 70}, seed=0)
    # Within a block the uses are shuffled, so whole epochs show over whole blocks.
    rows = collections.defaultdict(list)
    for k in range(7 * BLOCK):
        sample = mixture[k]
        rows[sample.epoch].append(sample.window)
    assert all(sorted(windows) == list(range(70)) for windows in rows.values())
    assert len(rows) == 100
    assert rows[0] != rows[1]


@settings(deadline=None, max_examples=20)
@given(st.lists(st.sampled_from([1, 2, 4, 8]), min_size=1, max_size=5))
def test_any_sequence_of_world_sizes_sees_the_stream_of_one(data_set, worlds):
    loader = Loader(data_set, {"code": 3, "chat": 1}, 64, seed=0)
    for step, world in enumerate(worlds):
        single = list(loader.micro_batches(step, 16, 2, 0, 1))
        shared = [list(loader.micro_batches(step, 16, 2, rank, world)) for rank in range(world)]
        interleaved = [shared[i % world][i // world] for i in range(8)]
        for ours, want in zip(interleaved, single, strict=True):
            assert torch.equal(ours.tokens_BT, want.tokens_BT)


def test_another_seed_is_another_order(data_set):
    first, second = (Loader(data_set, {"code": 1}, 64, seed) for seed in (0, 1))
    assert first.identity != second.identity
    assert [first.mixture[k] for k in range(20)] != [second.mixture[k] for k in range(20)]


def test_labels_are_the_next_tokens_except_masked_ones_and_document_starts():
    tokens = np.array([10, 11, 12, 20, 21], dtype=np.uint32)
    mask = np.array([True, False, True, True, True])
    starts = np.array([False, False, False, True, False])
    batch = collate([(tokens, mask, starts)])
    assert batch.tokens_BT.tolist() == [[10, 11, 12, 20]]
    assert batch.labels_BT.tolist() == [[IGNORE, 12, IGNORE, 21]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 1]]
    assert batch.num_scored == 2


def test_errors_name_what_is_wrong(data_set, tmp_path):
    with pytest.raises(UserError, match=r"data set folder not found: .*nowhere"):
        Loader(tmp_path / "nowhere", {"code": 1}, 64, 0)
    with pytest.raises(UserError, match=r"no train split of source 'codes'; it has: chat, code"):
        Loader(data_set, {"codes": 1}, 64, 0)
    with pytest.raises(UserError, match=r"source 'code' of .* has not a single row of 1000000 tokens"):
        Loader(data_set, {"code": 1}, 10**6, 0)
    with pytest.raises(UserError, match="row_length"):
        Loader(data_set, {"chat": 1}, 32, 0)
