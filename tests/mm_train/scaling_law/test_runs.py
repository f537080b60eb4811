"""The table of runs: what it takes, and one line for what it does not."""

import pytest

from mm_train.cli import UserError
from mm_train.scaling_law.runs import COLUMNS, read_runs, to_csv

GOOD = {"name": "a", "active_params": 100, "total_params": 800, "tokens": 10**9, "expansion": 8, "granularity": 8}
GOOD |= {"shared": 1, "seed": 0, "loss": 2.5}


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "runs.csv"
    path.write_text(to_csv([GOOD, GOOD | {"loss": 2.25, "expansion": 1}]))
    runs = read_runs(path)
    assert len(runs) == 2
    assert runs.loss.tolist() == [2.5, 2.25]
    assert runs.sparse.loss.tolist() == [2.5]
    assert runs.values("expansion") == [1, 8]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": "nan"}, "line 2: loss is nan, not finite: leave a run that failed out"),
        ({"loss": "inf"}, "not finite"),
        ({"loss": ""}, "loss is ''; it must be a number"),
        ({"loss": 0}, "loss is 0; it must be above 0"),
        ({"tokens": "1.5"}, "tokens is 1.5; it must be a whole number"),
        ({"tokens": -3}, "tokens is -3"),
        ({"expansion": 0.5}, "expansion is 0.5"),
        ({"shared": 2}, "shared is 2; it must be 0 or 1"),
        ({"total_params": 50}, r"active_params \(100\) exceeds total_params \(50\)"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path, change, says):
    path = tmp_path / "runs.csv"
    path.write_text(to_csv([GOOD | change]))
    with pytest.raises(UserError, match=says):
        read_runs(path)


@pytest.mark.parametrize("column", COLUMNS)
def test_a_missing_column_is_named(tmp_path, column):
    path = tmp_path / "runs.csv"
    path.write_text(to_csv([GOOD]).replace(column, "other"))
    with pytest.raises(UserError, match=f"lacks the column {column}"):
        read_runs(path)


def test_no_file_and_no_runs(tmp_path):
    with pytest.raises(UserError, match="cannot read the runs"):
        read_runs(tmp_path / "runs.csv")
    (tmp_path / "runs.csv").write_text(to_csv([]))
    with pytest.raises(UserError, match="has no runs"):
        read_runs(tmp_path / "runs.csv")
    (tmp_path / "runs.csv").write_text("")
    with pytest.raises(UserError, match="it has none"):
        read_runs(tmp_path / "runs.csv")
