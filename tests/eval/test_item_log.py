import pytest

from eval.item_log import ItemLog


def test_answers_are_there_again(tmp_path):
    log = ItemLog(tmp_path / "log")
    log.add({"a": (-1.5, True), "b": "text \u2028 and\nmore"})
    log.add({"c": (-0.1 - 0.2, False)})
    log.close()
    assert ItemLog(tmp_path / "log").answers == {
        "a": (-1.5, True),
        "b": "text \u2028 and\nmore",
        "c": (-0.1 - 0.2, False),
    }


def test_all_ranks_read_what_any_rank_wrote(tmp_path):
    for rank in range(3):
        log = ItemLog(tmp_path, rank)
        log.add({f"key {rank}": (float(rank), False)})
        log.close()
    assert set(ItemLog(tmp_path, 7).answers) == {"key 0", "key 1", "key 2"}


@pytest.mark.parametrize(
    "half", [b'{"key": "b", "answer": [-1', b'{"key": "b"', b"\xff\xfe", b'{"key": "b", "answer": [1]}']
)
def test_half_a_line_costs_that_line_only(tmp_path, half):
    log = ItemLog(tmp_path)
    log.add({"a": (-1.0, True)})
    log.close()
    with (tmp_path / "rank-0.jsonl").open("ab") as file:
        file.write(half)
    log = ItemLog(tmp_path)
    assert log.answers == {"a": (-1.0, True)}
    log.add({"c": "after"})
    log.close()
    assert ItemLog(tmp_path).answers == {"a": (-1.0, True), "c": "after"}
