import gzip
from pathlib import Path

from data_prep.config import SourceConfig
from data_prep.documents import Document, Unusable
from data_prep.machine import LIBRARY
from data_prep.sources import MACHINE


def make(kind: str, **values) -> SourceConfig:
    return SourceConfig(kind=kind, licence="CC0-1.0", domain="test", **values)


def read(source: SourceConfig) -> list:
    files, documents = MACHINE[source.kind]
    return list(documents(source, files(source)))


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
    assert any("numpy" in file.parent.name for file in MACHINE["machine_docs"][0](source))
    assert any("NumPy is the fundamental package" in item.text for item in read(source))


def test_machine_docs_of_the_system(tmp_path, monkeypatch):
    (tmp_path / "tool").mkdir()
    (tmp_path / "tool" / "README.gz").write_bytes(gzip.compress(b"How to use the tool."))
    (tmp_path / "tool" / "broken.txt.gz").write_bytes(b"not gzip")
    (tmp_path / "tool" / "guide.txt").write_text("A guide.")
    (tmp_path / "tool" / "link.txt").symlink_to("guide.txt")
    (tmp_path / "tool" / "copyright").write_text("ignored")
    monkeypatch.setattr("data_prep.machine.SYSTEM_DOCS", tmp_path)
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
    monkeypatch.setattr("data_prep.machine.LIBRARY", Path(tmp_path))
    for kind in ("machine_docs", "docstring_chat"):
        found = read(make(kind, parts=["docstrings"]))
        assert [item.reason for item in found if isinstance(item, Unusable)] == ["undecodable", "not parsable"]
        assert [item.key for item in found if isinstance(item, Document)] == ["new"]
