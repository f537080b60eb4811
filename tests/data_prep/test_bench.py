import gzip
import json

import pytest

from data_prep import bench
from data_prep.bench import Result, table, texts, turns, write_corpus
from data_prep.machine import LIBRARY


def test_the_corpus_is_the_text_of_files_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "LIBRARY", tmp_path / "library")
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "a.py").write_text("x = 1\n")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "same.txt").write_text("x = 1\n")
    (tmp_path / "more" / "page.html").write_text("<p>one &amp; <b>two</b></p><script>no</script>")
    (tmp_path / "more" / "z.txt.gz").write_bytes(gzip.compress("é".encode()))
    (tmp_path / "more" / "bad.txt").write_bytes(b"\xff")
    (tmp_path / "more" / "picture.png").write_bytes(b"png")
    found = list(texts([tmp_path / "more"]))
    assert found == ["x = 1\n", "one & two", "é"]
    assert write_corpus(tmp_path / "corpus", iter(found), 10) == (2, 15)
    lines = (tmp_path / "corpus" / "text.jsonl").read_text().splitlines()
    assert [json.loads(line)["text"] for line in lines] == found[:2]


def test_the_table_compares_with_and_without_the_start():
    drawn = table({"ours": Result([3.0, 2.0, 90.0], [7.0, 1.0, 0.5]), "theirs": Result([42.0], [2.0])}, 100.0)
    ours, theirs = drawn.splitlines()[1:]
    assert ours.split() == ["ours", "3.00", "1.00", "33.33", "50.00", "1.0x", "1.0x"]
    assert theirs.split() == ["theirs", "42.00", "2.00", "2.38", "2.50", "14.0x", "20.0x"]


def test_ours_and_theirs_take_turns():
    assert turns(["ours", "ours too", "a", "b"], 3) == [
        "ours",
        "ours too",
        "a",
        "ours",
        "ours too",
        "b",
        "ours",
        "ours too",
    ]
    assert turns(["ours", "a", "b"], 1) == ["ours", "a", "b"]
    assert turns(["a"], 2) == ["a"]


def test_bad_input_gives_one_clear_line(capsys):
    assert bench.main(["--text", "/nowhere"]) == 2
    assert "--text /nowhere is not a folder" in capsys.readouterr().err


@pytest.mark.slow
def test_every_pipeline_runs_and_our_tokens_are_those_of_tiktoken(capsys):
    for package in ("datatrove", "megatron", "llama_models", "orjson"):
        pytest.importorskip(package)
    assert LIBRARY.is_dir()
    assert bench.main(["--megabytes", "1"]) == 0
    assert "are those of tiktoken" in capsys.readouterr().out
