import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from eval.sequences import Prompt, Scored
from eval.tries import MIN_PREFIX, MIN_SAVED, chain, cluster, common, pack

IDS = st.lists(st.integers(0, 2), min_size=2, max_size=9)


def scored(ids: list[int], num_targets: int = 1) -> Scored:
    return Scored(np.array(ids, dtype=np.int32), min(num_targets, len(ids) - 1), 0, False)


@given(st.lists(st.tuples(IDS, st.integers(1, 4)), min_size=1, max_size=8))
def test_every_path_of_a_row_is_one_sequence(drawn):
    sequences = [scored(ids, num_targets) for ids, num_targets in drawn]
    rows = pack(list(enumerate(sequences)))
    found = {}
    for row in rows:
        token = np.arange(len(row))
        ancestors = (token <= token[:, None]) & (token[:, None] <= row.last)  # [of whom, who]
        assert (ancestors.sum(1) - 1 == row.depth).all()
        for path in row.paths:
            seen = np.flatnonzero(ancestors[path.nodes[-1]])
            assert (row.depth[seen] == np.arange(len(seen))).all()
            assert (seen[len(seen) - len(path.nodes) :] == path.nodes).all()
            assert row.trunk <= path.nodes[0]
            assert (row.ids[seen[: row.trunk]] == row.ids[: row.trunk]).all()
            found[path.number] = (*row.ids[seen], path.targets[-1]), tuple(path.targets)
    for number, sequence in enumerate(sequences):
        assert found[number] == (tuple(sequence.ids), tuple(sequence.ids[-sequence.num_targets :]))


@given(st.lists(IDS, min_size=1, max_size=8))
def test_a_row_has_no_token_twice(drawn):
    """As many tokens as there are different beginnings."""
    rows = pack(list(enumerate(map(scored, drawn))))
    beginnings = {tuple(ids[:k]) for ids in drawn for k in range(1, len(ids))}
    assert sum(map(len, rows)) == len(beginnings)


def test_sequences_that_do_not_begin_alike_have_rows_of_their_own():
    rows = pack([(0, scored([1, 2, 3])), (1, scored([5, 2, 3])), (2, scored([1, 2, 4, 4]))])
    assert sorted(tuple(path.number for path in row.paths) for row in rows) == [(0, 2), (1,)]


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 60), IDS), min_size=1, max_size=12))
def test_rows_of_a_cluster_share_its_prefix(drawn):
    """Few-shot heads of several lengths before questions."""
    prompts = [Prompt(np.array([head] * size + ids, dtype=np.int32), (), 1, 0, False) for head, size, ids in drawn]
    rows = [chain(number, prompt) for number, prompt in enumerate(prompts)]
    clusters = cluster(rows)
    assert sorted(index for found in clusters for index in found.rows) == list(range(len(rows)))
    for found in clusters:
        first = rows[found.rows[0]].ids
        assert all(common(first, rows[index].ids) >= found.prefix for index in found.rows)
        assert all(len(rows[index]) > found.prefix for index in found.rows)
        assert found.prefix == 0 or found.prefix >= MIN_PREFIX


def test_a_prefix_that_many_share_is_found_among_others():
    heads = [[7] * 40, [8] * 50, []]
    prompts = [Prompt(np.array([*heads[i % 3], i + 10, i + 100], dtype=np.int32), (), 1, 0, False) for i in range(12)]
    rows = [chain(number, prompt) for number, prompt in enumerate(prompts)]
    found = {group.prefix: sorted(group.rows) for group in cluster(rows)}
    assert found == {40: [0, 3, 6, 9], 50: [1, 4, 7, 10], 0: [2, 5, 8, 11]}
    assert MIN_SAVED <= 3 * 40
    assert [group.prefix for group in cluster(rows[:1])] == [0]
