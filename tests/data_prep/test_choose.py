import random
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data_prep.choose import DUPLICATE, UNIQUE, choose, find_duplicates
from data_prep.collect import INDEX, Report


def make_index(documents: list[tuple[int, int]]) -> np.ndarray:
    """Rows for (content, bytes); hashes are those of the content."""
    rows = []
    for content, size in documents:
        chance = random.Random(content)
        rows.append(((content, content * 7), chance.random(), chance.random(), 0, 0, size, False))
    return np.array(rows, dtype=INDEX)


def chosen(index, max_bytes=None, fraction=0.0, held_out=False, duplicates=None):
    report = Report()
    kinds = np.zeros(len(index), dtype=np.uint8) if duplicates is None else duplicates
    return choose(index, kinds, held_out, fraction, max_bytes, report), report


@given(st.lists(st.lists(st.integers(0, 12), max_size=12), min_size=1, max_size=5), st.integers(1, 7))
def test_duplicates_are_all_but_the_first_over_all_parts(tmp_path_factory, contents, at_a_time):
    import data_prep.choose as module

    folder = tmp_path_factory.mktemp("parts")
    parts: list[Path] = []
    for number, part in enumerate(contents):
        parts.append(folder / str(number))
        parts[-1].mkdir()
        np.save(parts[-1] / "index.npy", make_index([(content, 1) for content in part]))
    seen: set[int] = set()
    expected = [
        [DUPLICATE if content in seen or seen.add(content) else UNIQUE for content in part] for part in contents
    ]
    before, module.DOCUMENTS_AT_A_TIME = module.DOCUMENTS_AT_A_TIME, at_a_time
    try:
        assert [kinds.tolist() for kinds in find_duplicates(parts)] == expected
    finally:
        module.DOCUMENTS_AT_A_TIME = before


def test_split_is_by_hash_and_near_the_fraction():
    index = make_index([(i, 10) for i in range(3000)])
    train, _ = chosen(index, fraction=0.1)
    val, _ = chosen(index, fraction=0.1, held_out=True)
    assert sorted([*train, *val]) == list(range(3000))
    assert train.tolist() == sorted(train)
    assert 240 < len(val) < 360
    assert set(chosen(index[:1500], fraction=0.1, held_out=True)[0]) == {i for i in val if i < 1500}


def test_a_limit_keeps_the_same_documents_whatever_the_order():
    documents = [(i, random.Random(i).randint(1, 60)) for i in range(400)]
    limit = sum(size for _, size in documents) // 3
    kept = []
    for order in (documents, sorted(documents, key=lambda d: d[1]), documents[::-1]):
        numbers, report = chosen(make_index(order), limit)
        kept.append([order[i] for i in numbers])
        assert 0.9 * limit < sum(size for _, size in kept[-1]) <= limit
        assert report.dropped["over the train limit"][0] + len(numbers) == 400
    assert kept[0] == kept[1] == kept[2]


def test_a_large_document_does_not_keep_the_others_out():
    for i in range(8):  # wherever the large one comes in the order of hashes
        documents = [(1000 + i, 95), (2000 + i, 200), *((j, 10) for j in range(50))]
        numbers, _ = chosen(make_index(documents), 100)
        assert sum(documents[j][1] for j in numbers) > 85
        assert 1 not in numbers


def test_what_is_left_out_is_counted_with_its_split():
    duplicates = np.array([0, 1, 2, 0], dtype=np.uint8)
    numbers, report = chosen(make_index([(1, 5), (1, 5), (2, 6), (3, 7)]), duplicates=duplicates)
    assert numbers.tolist() == [0, 3]
    assert report.dropped == {"duplicate": [1, 5], "near duplicate": [1, 6]}
