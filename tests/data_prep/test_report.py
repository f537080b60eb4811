import json
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser

import numpy as np
import pytest
import yaml

from data_prep import report, run
from data_prep.report import document_lengths, histogram, read_data_report
from mm_train.shards import ShardReader
from mm_train.tokenizer import load_tokenizer

TEXTS = [f"{'text <b>&amp; ' * (i + 1)}{i}" for i in range(60)]


@pytest.fixture(scope="module")
def data(tmp_path_factory, byte_tokenizer):
    """A data set with a stream and a packed source, duplicates, short and contaminated documents."""
    folder = tmp_path_factory.mktemp("data")
    question = "how many of the keepers of this lighthouse have ever seen the white whale"
    rows = [{"text": text} for text in [*TEXTS, *TEXTS[:5], "x", f"quiz: {question}?", f"again: {question.upper()}"]]
    chats = [
        {"messages": [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"yes {i}"}]}
        for i in range(40)
    ]
    for name, some in (("web", rows), ("chat", chats), ("items", [{"question": question}])):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    common = {"kind": "files", "licence": "CC0-1.0"}
    config = {
        "out": str(folder / "out"),
        "validation_fraction": 0.1,
        "tokenizer": {"kind": "folder", "path": str(folder / "tokenizer")},
        "benchmarks": {"extra": [f"{folder}/items.jsonl"]},
        "sources": {
            "web": {**common, "paths": [f"{folder}/web.jsonl"], "domain": "web", "min_bytes": 3, "weight": 3},
            "talk": {
                **common,
                "paths": [f"{folder}/chat.jsonl"],
                "domain": "chat",
                "layout": "packed",
                "row_length": 65,
            },
        },
    }
    byte_tokenizer.save(folder / "tokenizer")
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    assert run.main([str(folder / "config.yaml"), "--workers", "1"]) == 0
    return folder / "out"


def test_the_numbers_of_the_page(data):
    found = read_data_report(data)
    assert found.domains == [
        ("web", ["web"], ShardReader(data / "web/train").num_tokens, 3.0),
        ("chat", ["talk"], ShardReader(data / "talk/train").num_tokens, 1.0),
    ]
    assert found.reasons == {"duplicate": 5, "in a benchmark": 2, "shorter than min_bytes": 1}
    assert [(name, documents, items) for name, documents, items, _ in found.hits] == [("items", 2, 1)]


def test_lengths_are_those_of_the_documents_without_padding(data):
    tokenizer = load_tokenizer(data)
    for name in ("web", "talk"):
        reader = ShardReader(data / name / "train")
        expected = [len(ids) for ids, _ in reader.documents() if ids[0] != tokenizer.pad_id]
        assert document_lengths(reader, tokenizer).tolist() == expected
        assert len(expected) == reader.manifest.num_documents


def test_a_histogram_counts_every_document():
    lengths = np.array([1, 2, 3, 4, 100, 100, 5000])
    drawn = ElementTree.fromstring(histogram(lengths))
    titles = [title.text for title in drawn.iter("title")]
    assert sum(int(re.search(r": ([\d,]+) documents", title).group(1)) for title in titles) == len(lengths)
    assert "64 to 127 tokens: 2 documents" in titles
    assert histogram(np.array([])) == ""


class Tags(HTMLParser):
    """Checks that tags are balanced and collects addresses."""

    VOID = ("meta",)

    def __init__(self):
        super().__init__()
        self.open, self.addresses, self.text = [], [], ""

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_is_whole_and_fetches_nothing(data, tmp_path, capsys):
    page = tmp_path / "deep" / "page.html"
    assert report.main([str(data), "--out", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    tags = Tags()
    tags.feed(text)
    assert tags.open == []
    assert tags.addresses == []
    assert "url(" not in text
    assert "how many of the keepers" in tags.text
    assert "text <b>&amp; " in tags.text  # of a corpus, not of the page
    assert "in benchmark items: 2 documents, 1 items" in capsys.readouterr().out
    assert report.main([str(data), "--out", str(tmp_path / "again.html")]) == 0
    assert (tmp_path / "again.html").read_text() == text


def test_bad_input_gives_one_clear_line(data, tmp_path, capsys):
    assert report.main([str(tmp_path)]) == 2
    assert "no data set in" in capsys.readouterr().err
    (tmp_path / "dataset.json").write_text("{")
    assert report.main([str(tmp_path)]) == 2
    assert "dataset.json is damaged" in capsys.readouterr().err
