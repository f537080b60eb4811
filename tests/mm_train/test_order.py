import collections
import hashlib
import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train.cli import UserError
from mm_train.order import BLOCK, CHUNK, Mixture, feistel, quotas, round_keys
from tests.mm_train import order_reference

PAPER = {"web": 62, "math": 11.6, "code": 10, "knowledge": 10, "science": 6.4}
# 6 T tokens in rows of 2048, and sizes that are awkward: fewer rows than a block's share, one row, a power of four + 1.
ROWS = {"web": 1_816_406_250, "math": 339_843_750, "code": 37, "knowledge": 65_537, "science": 1}


def listed(mixture, first, stop):
    columns = (values.tolist() for values in mixture.samples(first, stop))
    return [(mixture.names[source], epoch, window) for source, epoch, window in zip(*columns, strict=True)]


@settings(max_examples=100)
@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
def test_feistel_is_a_permutation_and_the_reference_s(size, key):
    index = np.arange(size)
    images = feistel(index, np.full(size, size), np.repeat(round_keys([key]), size, axis=1)).tolist()
    assert sorted(images) == list(range(size))
    assert images == [order_reference.feistel(i, size, key) for i in range(size)]


@given(st.integers(1, 2**52), st.integers(0, 2**64 - 1), st.floats(0, 1, exclude_max=True))
def test_feistel_of_any_size_is_the_reference_s(size, key, place):
    index = int(size * place)
    (image,) = feistel(np.array([index]), np.array([size]), round_keys([key]))
    assert image == order_reference.feistel(index, size, key)


@given(st.dictionaries(st.text(min_size=1), st.floats(0.001, 100), min_size=1, max_size=20))
def test_quotas_add_up_and_are_within_one_of_exact(weights):
    counts = quotas(weights)
    assert sum(counts.values()) == BLOCK
    for name, weight in weights.items():
        assert abs(counts[name] - weight / sum(weights.values()) * BLOCK) < 1


@settings(max_examples=30)
@given(
    st.dictionaries(st.sampled_from("abcdefgh"), st.tuples(st.integers(1, 50), st.integers(1, 10**10)), min_size=1),
    st.integers(0, 2**31),
    st.integers(0, 3 * 10**9),
)
def test_the_order_is_the_reference_s(sources, seed, first):
    mixture = Mixture({name: weight for name, (weight, _) in sources.items()}, dict_of(sources, 1), seed)
    want = [order_reference.sample(mixture.quotas, mixture.num_windows, seed, k) for k in range(first, first + 40)]
    assert listed(mixture, first, first + 40) == want
    assert mixture[first] == want[0]


def dict_of(sources, place):
    return {name: values[place] for name, values in sources.items()}


def test_the_order_is_that_of_the_first_version_for_ever():
    """Hashes that the first version of this code gave: runs of years ago go on in the same order."""
    mixture = Mixture(PAPER, ROWS, seed=3)
    for first, want in ((0, "7b4745f67d2b287f"), (2_929_686_999, "fb6ff48721b9df26")):
        lines = "\n".join(" ".join(map(str, sample)) for sample in listed(mixture, first, first + 2000))
        assert hashlib.sha256(lines.encode()).hexdigest().startswith(want)


def test_samples_in_pieces_are_the_samples():
    borders = (0, 1, 999, 1000, 15_990, 16_000, 16_010, 48_001, 48_001)
    mixture = Mixture(PAPER, ROWS, seed=0)
    pieces = [sample for pair in itertools.pairwise(borders) for sample in listed(mixture, *pair)]
    assert pieces == listed(mixture, borders[0], borders[-1])
    assert borders[-1] > 2 * CHUNK * BLOCK


def test_paper_shares_are_exact_in_every_block():
    mixture = Mixture(PAPER, ROWS, seed=3)
    for block in (0, 1, 17, 10**6):
        seen = collections.Counter(source for source, _, _ in listed(mixture, block * BLOCK, (block + 1) * BLOCK))
        assert seen == {"web": 620, "math": 116, "code": 100, "knowledge": 100, "science": 64}


def test_every_row_once_an_epoch_and_a_new_order_each():
    mixture = Mixture({"a": 1.0}, {"a": 70}, seed=0)
    # Within a block the uses are shuffled, so whole epochs show over whole blocks.
    rows = collections.defaultdict(list)
    for _, epoch, window in listed(mixture, 0, 7 * BLOCK):
        rows[epoch].append(window)
    assert all(sorted(windows) == list(range(70)) for windows in rows.values())
    assert len(rows) == 100
    assert rows[0] != rows[1]


def test_a_mixture_that_follows_another_counts_on():
    rows = {"a": 5000, "b": 300}
    first = Mixture({"a": 1, "b": 1}, rows, seed=1)
    begin = 2 * BLOCK + 30
    then = Mixture({"a": 9, "b": 1}, rows, seed=1, start=begin, used=first.uses(begin))
    assert first.uses(begin) == {"a": 1500, "b": 1500}
    seen = [sample for k in (0, 1, 2) for sample in listed(first, k * BLOCK, (k + 1) * BLOCK)]
    seen += listed(then, begin, begin + BLOCK)
    assert sum(source == "a" for source, _, _ in seen) == 1500 + 900
    assert len(set(seen)) == len(seen)  # nothing is read twice
    assert {window for source, epoch, window in seen if (source, epoch) == ("b", 4)} == set(range(300))
    assert then.epochs(begin + BLOCK) == {"a": 2400 / 5000, "b": 1600 / 300}
    with pytest.raises(IndexError, match="before sample 2030"):
        then[begin - 1]


def test_a_weight_too_small_is_refused():
    with pytest.raises(UserError, match=r"data\.mixture\.b \(0\.0001\) is below one sample in 1000"):
        Mixture({"a": 1.0, "b": 0.0001}, {"a": 1, "b": 1}, seed=0)
