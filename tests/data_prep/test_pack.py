import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_prep.pack import best_fit


@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=80), st.just(n))))
def test_every_document_once_and_no_row_over_capacity(case):
    lengths, capacity = case
    rows = best_fit(lengths, capacity)
    assert sorted(index for row in rows for index in row) == list(range(len(lengths)))
    used = [sum(lengths[index] for index in row) for row in rows]
    assert all(0 < tokens <= capacity for tokens in used)
    # best fit never leaves two rows that would fit into one
    assert all(a + b > capacity for i, a in enumerate(used) for b in used[:i])
    assert rows == sorted(rows)


def test_the_fullest_row_with_room_is_taken():
    assert best_fit([6, 5, 4, 3, 2], 10) == [[0, 2], [1, 3, 4]]


def test_lengths_that_do_not_fit():
    for length in (0, 11):
        with pytest.raises(ValueError, match=f"document of {length} tokens does not fit a row of 10"):
            best_fit([3, length], 10)


@settings(max_examples=200)
@given(st.integers(1, 70).flatmap(lambda n: st.tuples(st.lists(st.integers(1, n), max_size=80), st.just(n))))
def test_it_is_what_placing_one_document_at_a_time_gives(case):
    lengths, capacity = case
    rows, free, touched = [], [], []
    for clock, index in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        room = [row for row in range(len(rows)) if free[row] >= lengths[index]]
        # The fullest; of equally full ones, that which was filled last.
        row = min(room, key=lambda row: (free[row], -touched[row]), default=len(rows))
        if row == len(rows):
            rows.append([])
            free.append(capacity)
            touched.append(0)
        rows[row].append(index)
        free[row] -= lengths[index]
        touched[row] = clock
    assert best_fit(lengths, capacity) == sorted(sorted(row) for row in rows)


@pytest.mark.parametrize("capacity", [2049, 8193])
@pytest.mark.parametrize("mean", [5, 6])  # of the logarithm: 150 and 400 tokens in the middle
def test_many_documents_are_packed_tightly_and_quickly(capacity, mean):
    """As many as encode.py packs together."""
    random = np.random.default_rng(0)
    lengths = np.minimum(capacity, random.lognormal(mean, 1, 65_536).astype(int) + 1)
    start = time.process_time()
    rows = best_fit(lengths, capacity)
    assert time.process_time() - start < 1
    assert len(rows) * capacity < 1.0005 * lengths.sum() + capacity
