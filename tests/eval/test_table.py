from html.parser import HTMLParser

import pytest

from eval import table

PUBLISHED = {"MobileMoE-S": {"average": 46.5, "piqa": 75.4}, "OLMoE": {"average": 52.4}}


@pytest.fixture
def results() -> dict:
    ran = {"status": "ok", "reason": "", "metric": "acc", "shots": 0, "verified": False, "score": 0.5, "stderr": 0.0123}
    ran |= {"interval": [0.48, 0.52], "n": 50, "n_total": 1838, "n_published": 1838, "complete": False, "chance": 0.25}
    ran |= {"bits_per_byte": 1.2345, "macro": 0.5, "centred": 1 / 3}
    rest = dict.fromkeys(("score", "stderr", "interval", "chance", "bits_per_byte", "macro", "centred"))
    missing = ran | {"status": "missing", "reason": "no items | of <it>", "metric": "f1", "shots": 3, "n": 0, **rest}
    tasks = {"piqa": ran, "one": {**ran, "stderr": None, "n": 1, "macro": 0.25}, "drop": missing}
    found = {
        "model": "runs/x",
        "format": "bf16",
        "limit": 50,
        "suite": "paper14",
        "tasks": tasks,
        "average": 0.5,
        "seconds": 1.0,
    }
    return found | {"average_complete": False, "centred_average": 1 / 3, "bits_per_byte_average": 1.2345}


def test_terminal_columns_are_aligned(results):
    lines = table.terminal(results, PUBLISHED).splitlines()
    column = lines[0].index("status")
    assert [line[column:] for line in lines[:4]] == ["status", "ok", "ok", "missing"]
    cells = ["piqa", "0?", "acc", "50", "of", "1838", "50.0", "±", "1.2", "*", "48.0", "-", "52.0", "25.0", "1.234"]
    assert lines[1].split() == [*cells, "75.4", "ok"]
    assert "±" not in lines[2]
    assert lines[4].split() == ["average", "50.0", "*", "46.5"]
    assert lines[5:7] == ["", "drop: missing, no items | of <it>"]
    assert lines[7].startswith("* not the complete set; the average is over the 2 of 3 that ran, 0 of them complete")
    assert "mean over their parts (macro): one 25.0" in lines
    assert "MobileMoE-S 46.5, OLMoE 52.4. Unverified: prompts, shots and metrics of the paper" in lines[-1]


def test_a_published_average_stands_beside_that_of_the_same_benchmarks_only(results):
    lines = table.terminal(results | {"suite": None}, PUBLISHED).splitlines()
    assert lines[4].split() == ["average", "50.0", "*"]


def test_a_complete_average_has_no_mark(results):
    tasks = {"piqa": results["tasks"]["piqa"] | {"complete": True}}
    text = table.terminal(results | {"tasks": tasks, "average_complete": True}, PUBLISHED)
    assert "*" not in text


def test_markdown_has_as_many_cells_in_each_row(results):
    text = table.markdown(results, PUBLISHED)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert {row.count("|") for row in rows} == {len(table.header(PUBLISHED)) + 1}
    assert text.startswith("# Evaluation of runs/x (bf16, at most 50 items each)\n")


def test_the_page_is_well_formed_and_escapes(results):
    class Checker(HTMLParser):
        """Every tag that has to be closed is, in order."""

        def __init__(self) -> None:
            super().__init__()
            self.open: list[str] = []
            self.cells = 0

        def handle_starttag(self, tag, attrs):
            self.cells += tag in ("td", "th")
            self.open += [] if tag == "meta" else [tag]

        def handle_endtag(self, tag):
            assert self.open.pop() == tag

    page = table.page(results, PUBLISHED)
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert checker.cells == 5 * (len(table.header(PUBLISHED)) + 1)
    assert "&lt;it&gt;" in page
    assert "width:50.0%" in page


def test_nothing_ran(results):
    results |= {"tasks": {"drop": results["tasks"]["drop"]}, "average": None, "centred_average": None}
    assert "the average is over" not in table.terminal(results, PUBLISHED)
