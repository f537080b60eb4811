import pytest

from eval import table


@pytest.fixture
def results() -> dict:
    ran = {"status": "ok", "reason": "", "metric": "acc", "shots": 0, "score": 0.5, "stderr": 0.0123, "n": 50}
    ran |= {"n_total": 1838, "chance": 0.25, "bits_per_byte": 1.2345}
    rest = {"score": None, "stderr": None, "n": 0, "n_total": 0, "chance": None, "bits_per_byte": None}
    missing = {"status": "missing", "reason": "no items | of it", "metric": "f1", "shots": 3, **rest}
    tasks = {"piqa": ran, "one": {**ran, "stderr": None, "n": 1}, "drop": missing}
    return {"model": "runs/x", "format": "bf16", "limit": 50, "tasks": tasks, "average": 0.5, "seconds": 1.0}


def test_terminal_columns_are_aligned(results):
    lines = table.terminal(results, {"MobileMoE-S": 46.5}).splitlines()
    column = lines[0].index("status")
    assert [line[column:] for line in lines[:4]] == ["status", "ok", "ok", "missing"]
    assert lines[1].split() == ["piqa", "0", "acc", "50", "of", "1838", "50.0", "±", "1.2", "25.0", "1.234", "ok"]
    assert "±" not in lines[2]
    assert lines[4:7] == ["", "drop: missing, no items | of it", "average of the 2 that ran: 50.0"]
    assert "published averages of all 14 (base models; settings may differ): MobileMoE-S 46.5" in lines[-1]


def test_markdown_has_as_many_cells_in_each_row(results):
    text = table.markdown(results, {"MobileMoE-S": 46.5})
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(table.HEADER) + 1}
    assert text.startswith("# Evaluation of runs/x (bf16, at most 50 items each)\n")


def test_nothing_ran(results):
    results |= {"tasks": {"drop": results["tasks"]["drop"]}, "average": None}
    assert "average of" not in table.terminal(results, {"MobileMoE-S": 46.5})
