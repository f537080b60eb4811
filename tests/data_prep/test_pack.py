import random
import time

import pytest
from hypothesis import given
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


def test_many_documents_are_packed_tightly_and_quickly():
    random.seed(0)
    lengths = [min(8192, int(random.lognormvariate(6, 1)) + 1) for _ in range(50_000)]
    start = time.process_time()
    rows = best_fit(lengths, 8192)
    assert time.process_time() - start < 5
    assert len(rows) * 8192 < 1.001 * sum(lengths) + 8192
