import gzip
import json
from pathlib import Path

import pytest

from data_prep.config import SourceConfig
from data_prep.sources import KINDS, LIBRARY, Document, Unusable
from mm_train.cli import UserError


def make(kind: str, **values) -> SourceConfig:
    return SourceConfig(kind=kind, licence="CC0-1.0", domain="test", **values)


def read(source: SourceConfig) -> list:
    kind = KINDS[source.kind]
    return list(kind.read(source, kind.files(source)))


def test_text_files_of_every_kind(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("α\r\n", newline="")
    (tmp_path / "deep" / "b.md").write_text("# b\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}]
    lines = [
        json.dumps({"text": "one", "id": 3}),
        "",
        json.dumps({"messages": messages, "text": "ignored"}),
        json.dumps({"messages": [{"role": "gpt", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user"}]}),
        json.dumps({"messages": [{"role": "user", "content": None}]}),
        json.dumps({"title": "no text"}),
        json.dumps(["text"]),
        '{"text": 3}',
        '{"text": "\\ud800"}',
        "{",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = read(make("text_files", paths=[f"{tmp_path}/*.txt", f"{tmp_path}/**/*.md", f"{tmp_path}/*.jsonl"]))
    assert [item for item in found if isinstance(item, Document)] == [
        Document("α\r\n"),
        Document("# b\n"),
        Document("one"),
        Document(messages=tuple(messages)),
    ]
    reasons = [item.reason for item in found if isinstance(item, Unusable)]
    assert reasons == ["undecodable", "unknown role", *["malformed line"] * 5, "undecodable", "malformed line"]
    assert [item.num_bytes for item in found if isinstance(item, Document)] == [4, 4, 3, 3]


def test_globs_that_match_nothing_or_too_much(tmp_path):
    (tmp_path / "a.txt").touch()
    (tmp_path / "a.zip").touch()
    with pytest.raises(UserError, match=r"no document source at .*/\*\.md"):
        read(make("text_files", paths=[f"{tmp_path}/*.txt", f"{tmp_path}/*.md"]))
    with pytest.raises(UserError, match=r"cannot read .*a\.zip: a text file ends in \.txt, \.md, \.py, \.jsonl"):
        read(make("text_files", paths=[f"{tmp_path}/*"]))


def test_standard_library_code():
    source = make("stdlib_code", exclude=["[!jt]*", "test/*"])
    documents = {item.key: item for item in read(source)}
    assert documents["json.decoder"].text == (LIBRARY / "json" / "decoder.py").read_text(encoding="utf-8")
    assert "textwrap" in documents
    assert all(name[0] in "jt" and not name.startswith("test.") for name in documents)


def test_machine_docs():
    found = {item.key: item.text for item in read(make("machine_docs", exclude=["[!t]*", "test/*", "tkinter/*"]))}
    assert found["topic lambda"].startswith("Lambdas")
    assert "textwrap.shorten(text, width, **kwargs)\n\nCollapse and truncate" in found["textwrap"]
    assert "import" not in found["textwrap"]


def test_machine_docs_of_packages():
    source = make("machine_docs", parts=["packages"])
    assert any("numpy" in file.parent.name for file in KINDS["machine_docs"].files(source))
    assert any("NumPy is the fundamental package" in item.text for item in read(source))


def test_machine_docs_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "README.gz").write_bytes(gzip.compress(b"How to use the tool."))
    (tmp_path / "tool" / "broken.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "tool" / "guide.txt").write_text("A guide.")
    (tmp_path / "tool" / "link.txt").symlink_to("guide.txt")
    (tmp_path / "tool" / "copyright").write_text("ignored")
    monkeypatch.setattr("data_prep.sources.SYSTEM_DOCS", tmp_path)
    found = read(make("machine_docs", parts=["system"]))
    assert found == [Document("How to use the tool."), Unusable("undecodable", 8), Document("A guide.")]


def test_chat_shares_its_key_with_the_module_it_is_about():
    found = read(make("docstring_chat", exclude=["[!t]*", "test/*", "tkinter/*"]))
    about = [item for item in found if "`textwrap.shorten`" in item.messages[0]["content"]]
    assert about
    assert {item.key for item in about} == {"textwrap"}
    assert any(item.messages[1]["content"].startswith("Collapse and truncate the given text") for item in about)
    assert [message["role"] for message in about[0].messages] == ["user", "assistant"]


def test_unparsable_code_is_counted(tmp_path, monkeypatch):
    (tmp_path / "old.py").write_text("print 'x'")
    (tmp_path / "new.py").write_text('"""A module with a docstring."""')
    (tmp_path / "latin.py").write_bytes(b"# \xe9")
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").touch()
    monkeypatch.setattr("data_prep.sources.LIBRARY", Path(tmp_path))
    for kind in ("machine_docs", "docstring_chat"):
        found = read(make(kind, parts=["docstrings"]))
        assert [item.reason for item in found if isinstance(item, Unusable)] == ["undecodable", "not parsable"]
        assert [item.key for item in found if isinstance(item, Document)] == ["new"]
