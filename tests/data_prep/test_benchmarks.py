import json
from hashlib import sha256
from pathlib import Path

import pyarrow as pa
import pytest

from data_prep.benchmarks import Benchmarks, build, identity, texts_of
from data_prep.config import BenchmarksConfig
from mm_train.cli import UserError

QUESTION = "Which of these planets in our solar system has the largest number of known moons today"
SHORT = "who sings the song about the yellow submarine"

ROWS = {
    "org/quiz/default/test": [
        {"question": QUESTION, "choices": {"text": ["Saturn", "Mars"], "label": ["A", "B"]}, "answerKey": "A"},
        {"question": SHORT, "answer": ["The Beatles"]},
        {"question": "too short", "answer": ["x"]},
    ],
    "org/gaps/xl/validation": [
        {
            "sentence": "The trophy does not fit into the brown suitcase because the _ is much too large for it",
            "option1": "trophy",
            "option2": "suitcase",
            "answer": "1",
        }
    ],
}


@pytest.fixture
def mirror(tmp_path) -> Path:
    """A folder in the format of eval.mirror."""
    entries = {}
    for name, rows in ROWS.items():
        file = tmp_path / "mirror" / f"{name}.arrow"
        file.parent.mkdir(parents=True)
        table = pa.Table.from_pylist(rows)
        with pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table)
        data = file.read_bytes()
        entries[name] = {"items": len(rows), "bytes": len(data), "sha256": sha256(data).hexdigest()}
    content = {"format": 1, "source": "test", "files": entries}
    (tmp_path / "mirror" / "mirror.json").write_text(json.dumps(content))
    return tmp_path / "mirror"


def opened(config: BenchmarksConfig, folder: Path) -> Benchmarks:
    build(config, folder)
    return Benchmarks(folder)


def test_items_are_found_and_named(mirror, tmp_path):
    index = opened(BenchmarksConfig(mirror=str(mirror)), tmp_path / "index")
    found = index.search(
        [
            f"Some page. {QUESTION}? Saturn.",
            "nothing",
            f"... {SHORT.upper()}?",
            "the trophy does not fit into the brown suitcase because the trophy is much too large for it",
            "a page about planets in our solar system and the largest number of known moons",
        ]
    )
    assert {number: (item.benchmark, item.item) for number, item in found.items()} == {
        0: ("org/quiz/default/test", 0),
        2: ("org/quiz/default/test", 1),
        3: ("org/gaps/xl/validation", 0),
    }
    assert found[2].words == "who sings the song about the yellow submarine"
    facts = json.loads((tmp_path / "index" / "benchmarks.json").read_text())
    assert facts["items"] == {"org/quiz/default/test": 3, "org/gaps/xl/validation": 1}
    assert facts["covered"] == {"org/quiz/default/test": 2, "org/gaps/xl/validation": 1}


def test_turns_of_phrase_are_no_items(tmp_path):
    phrase = "which of the following statements about the subject of this chapter is the most accurate one"
    rows = [{"question": f"{phrase} number{i} word{i} other{i}"} for i in range(30)] + [{"question": phrase}]
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    index = opened(BenchmarksConfig(extra=[str(tmp_path / "items.jsonl")]), tmp_path / "index")
    assert index.search([f"{phrase} apart from this", f"see: {phrase} number7 word7 other7"]).keys() == {0, 1}
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows[:-1]))
    index = opened(BenchmarksConfig(extra=[str(tmp_path / "items.jsonl")]), tmp_path / "again")
    assert index.search([f"{phrase} apart from this", f"see: {phrase} number7 word7 other7"]).keys() == {1}


def test_the_texts_of_an_item():
    row = {"Question": "q", "Correct Answer": "a", "passage": "p", "label": 1}
    assert texts_of(row, passages=False) == ["q", "q\na"]
    assert texts_of(row, passages=True) == ["q", "q\na", "p"]
    assert texts_of({"prompt": "def f():", "canonical_solution": "  return 1"}, False) == [
        "def f():",
        "def f():\n  return 1",
    ]
    assert texts_of({"answer": {"value": "v", "aliases": ["w"]}, "question": "q"}, False) == ["q", "q\nv"]


def test_identity_follows_items_and_settings(mirror):
    assert identity(BenchmarksConfig()) == ""
    first = identity(BenchmarksConfig(mirror=str(mirror)))
    assert identity(BenchmarksConfig(mirror=str(mirror))) == first
    assert identity(BenchmarksConfig(mirror=str(mirror), ngram=12)) != first


def test_items_that_cannot_be_read(mirror, tmp_path):
    with pytest.raises(UserError, match=r"no benchmark items in .*nowhere: run python -m eval\.prepare_data"):
        identity(BenchmarksConfig(mirror=str(tmp_path / "nowhere")))
    with pytest.raises(UserError, match="no benchmark items at"):
        identity(BenchmarksConfig(extra=[str(tmp_path / "none*.jsonl")]))
    (tmp_path / "bad.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"benchmark items .*bad\.jsonl cannot be read"):
        build(BenchmarksConfig(extra=[str(tmp_path / "bad.jsonl")]), tmp_path / "index")
    file = mirror / "org/gaps/xl/validation.arrow"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"validation\.arrow are not what mirror\.json lists"):
        build(BenchmarksConfig(mirror=str(mirror)), tmp_path / "index")
    (mirror / "mirror.json").write_text("{}")
    with pytest.raises(UserError, match=r"mirror\.json is damaged"):
        identity(BenchmarksConfig(mirror=str(mirror)))
