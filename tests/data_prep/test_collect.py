import json
from pathlib import Path

import numpy as np
import pytest

from data_prep.collect import Spool, collect, from_bytes, read_report, to_bytes
from data_prep.config import SourceConfig
from data_prep.documents import Document
from data_prep.sources import find_input


def make(paths: list[Path], **values) -> SourceConfig:
    return SourceConfig("files", "CC0-1.0", "code", paths=[str(path) for path in paths], **values)


def read(source: SourceConfig, folder: Path) -> Spool:
    (part,) = find_input("a", source, 1 << 30).parts
    collect(source, part, None, folder)
    return Spool(folder)


def lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_every_document_is_kept_or_counted_under_a_reason(tmp_path):
    unanswered = json.dumps({"messages": [{"role": "user", "content": "anyone there?"}]})
    file = lines(tmp_path / "a.jsonl", ["first text", "second\r\ntext", " \n", "", "tiny"])
    file.write_bytes(file.read_bytes() + f"{unanswered}\n{{\n".encode() + b'{"text": "\xff"}\n')
    spool = read(make([file], min_bytes=5, normalise=["newlines"]), tmp_path / "spool")
    report = read_report(tmp_path / "spool")
    assert report.dropped == {
        "empty": [2, 2],
        "shorter than min_bytes": [1, 4],
        "no answer": [1, 13],
        "malformed line": [1, 2],
        "undecodable": [1, 14],
    }
    assert report.examples["shorter than min_bytes"] == ["tiny"]
    assert [spool[i].text for i in range(len(spool.index))] == ["first text", "second\ntext"]
    assert spool.index["bytes"].tolist() == [10, 11]


def test_hashes_are_of_the_content_and_spread_evenly(tmp_path):
    spool = read(make([lines(tmp_path / "a.jsonl", [f"document {i}" for i in range(3000)])]), tmp_path / "spool")
    again = read(make([lines(tmp_path / "b.jsonl", ["x", "document 7"])]), tmp_path / "again")
    assert spool.index[7][["digest", "rank", "share"]] == again.index[1][["digest", "rank", "share"]]
    for column in ("rank", "share"):
        assert np.histogram(spool.index[column], 10, (0, 1))[0].min() > 220
    assert np.corrcoef(spool.index["rank"], spool.index["share"])[0, 1] == pytest.approx(0, abs=0.06)


def test_a_document_comes_back_from_its_bytes():
    for document in (
        Document('é\n\u2028 \\ " \x00'),
        Document(messages=({"role": "user", "content": "q"}, {"role": "assistant", "content": "日本"})),
    ):
        assert from_bytes(to_bytes(document), bool(document.messages)) == document


def test_nothing_is_left_of_a_part_that_fails(tmp_path):
    file = lines(tmp_path / "a.jsonl", ["one"])
    source = make([file])
    (part,) = find_input("a", source, 1 << 30).parts
    file.unlink()
    with pytest.raises(Exception, match=r"cannot read .*a\.jsonl"):
        collect(source, part, None, tmp_path / "spool")
    assert not (tmp_path / "spool").exists()
