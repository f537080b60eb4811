import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_prep.config import SourceConfig
from data_prep.documents import Document, Unusable
from data_prep.sources import find_input, read
from mm_train.cli import UserError


def make(*paths, **values) -> SourceConfig:
    return SourceConfig("files", "CC0-1.0", "web", paths=[str(path) for path in paths], **values)


def documents(source: SourceConfig, part_bytes: int = 1 << 30) -> list:
    parts = find_input("x", source, part_bytes).parts
    return [item for part in parts for item in read(source, part)]


def texts(source: SourceConfig, part_bytes: int = 1 << 30) -> list[str]:
    return [item.text for item in documents(source, part_bytes)]


def test_text_and_json_lines(tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "a.txt").write_text("α\r\n", newline="")
    (tmp_path / "deep" / "b.md").write_text("# b\n")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe")
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "é"}]
    lines = [
        json.dumps({"text": "one", "id": 3}),
        "",
        json.dumps({"messages": messages, "text": "ignored"}),
        json.dumps({"messages": [{"role": "narrator", "content": "x"}]}),
        json.dumps({"messages": [{"role": "user"}]}),
        json.dumps({"messages": [{"role": "user", "content": None}]}),
        json.dumps({"title": "no text"}),
        json.dumps(["text"]),
        '{"text": 3}',
        '{"text": "\\ud800"}',
        "{",
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    found = documents(make(f"{tmp_path}/*.txt", f"{tmp_path}/**/*.md", f"{tmp_path}/*.jsonl"))
    assert [item for item in found if isinstance(item, Document)] == [
        Document("α\r\n"),
        Document("# b\n"),
        Document("one"),
        Document(messages=tuple(messages)),
    ]
    reasons = [item.reason for item in found if isinstance(item, Unusable)]
    assert reasons == [
        "undecodable",
        "unknown role",
        "malformed row",
        "malformed row",
        "no column",
        "malformed line",
        "malformed row",
        "undecodable",
        "malformed line",
    ]
    assert [item.num_bytes for item in found if isinstance(item, Document)] == [4, 4, 3, 3]


ROWS = [{"id": i, "text": f"text {i} " * (i % 7 + 1)} for i in range(200)]


def write(file: Path) -> Path:
    """ROWS in the format that the name says."""
    lines = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    table = pa.Table.from_pylist(ROWS)
    if file.suffix == ".parquet":
        pq.write_table(table, file, row_group_size=30)
    elif file.name.endswith("file.arrow"):
        with pa.ipc.new_file(file, table.schema) as sink:
            sink.write_table(table, max_chunksize=50)
    elif file.suffix == ".arrow":
        with pa.ipc.new_stream(file, table.schema) as sink:
            sink.write_table(table, max_chunksize=50)
    elif file.suffix == ".gz":
        file.write_bytes(gzip.compress(lines[:900]) + gzip.compress(lines[900:]))
    elif file.suffix == ".zst":
        compress = zstandard.ZstdCompressor().compress
        file.write_bytes(compress(lines[:900]) + compress(lines[900:]))
    else:
        file.write_bytes(lines)
    return file


FORMATS = ["a.parquet", "stream.arrow", "file.arrow", "a.jsonl", "a.json", "a.jsonl.gz", "a.json.gz", "a.json.zst"]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("part_bytes", [1, 700, 5000, 1 << 30])
def test_every_format_gives_every_row_once_however_it_is_cut(tmp_path, name, part_bytes):
    source = make(write(tmp_path / name))
    assert texts(source, part_bytes) == [row["text"] for row in ROWS]
    parts = len(find_input("x", source, part_bytes).parts)
    if part_bytes <= 700:
        assert (parts > 1) == (name in ("a.parquet", "a.jsonl", "a.json"))


def test_several_files_share_a_part_and_large_ones_are_divided(tmp_path):
    for i in range(6):
        write(tmp_path / f"{i}.jsonl")
    size = (tmp_path / "0.jsonl").stat().st_size
    source = make(f"{tmp_path}/*.jsonl")
    assert len(find_input("x", source, 2 * size).parts) == 3
    assert len(find_input("x", source, size // 2 + 1).parts) == 12
    assert texts(source, 2 * size) == texts(source, 999) == [row["text"] for row in ROWS] * 6


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "a.jsonl.gz", "a.json.zst"])
def test_half_a_file_is_no_file(tmp_path, name):
    file = write(tmp_path / name)
    file.write_bytes(file.read_bytes()[: file.stat().st_size * 2 // 3])
    with pytest.raises(UserError, match=rf"cannot read .*{name}: "):
        documents(make(file))


@pytest.mark.parametrize("name", ["a.parquet", "stream.arrow", "a.jsonl"])
def test_a_missing_column_is_named_with_those_there_are(tmp_path, name):
    with pytest.raises(UserError, match=rf"{name} has no column 'content': it has id, text"):
        documents(make(write(tmp_path / name), column="content"))


def test_columns_of_every_layout(tmp_path):
    def one(row: dict, **values) -> Document | Unusable:
        file = tmp_path / "a.parquet"
        pq.write_table(pa.Table.from_pylist([row]), file)
        (document,) = documents(make(file, **values))
        return document

    pair = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "a"})
    assert one({"content": "x = 1", "lang": "py"}, column="content") == Document("x = 1")
    assert one({"meta": {"body": "deep"}}, column="meta.body") == Document("deep")
    assert one({"messages": list(pair), "text": "no"}) == Document(messages=pair)
    sharegpt = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert one({"conversations": sharegpt}, column="conversations") == Document(messages=pair)
    assert one({"problem": "q", "solution": "a"}, prompt="problem", response="solution") == Document(messages=pair)
    assert one({"input": [pair[0]], "output": "a"}, prompt="input", response="output") == Document(messages=pair)
    assert one({"s": "be", "p": "q", "r": "a"}, prompt="p", response="r", system="s").messages == (
        {"role": "system", "content": "be"},
        *pair,
    )
    assert one({"question": "-", "answer": "a"}, prompt="question", response="answer").reason == "no prompt"
    turns = (("system", "s"), ("function_call", "f()"), ("observation", "1"))
    tools = [{"from": role, "value": value} for role, value in turns]
    assert [message["role"] for message in one({"c": tools}, column="c").messages] == ["system", "assistant", "tool"]


def test_globs_that_match_nothing_or_too_much(tmp_path):
    (tmp_path / "a.txt").touch()
    with pytest.raises(UserError, match=r"source x is empty: its 1 file\(s\) have no content"):
        documents(make(f"{tmp_path}/*.txt"))
    (tmp_path / "a.zip").write_text("x")
    with pytest.raises(UserError, match=r"no document source at .*/\*\.md"):
        documents(make(f"{tmp_path}/*.txt", f"{tmp_path}/*.md"))
    with pytest.raises(UserError, match=r"cannot read .*a\.zip: a corpus file ends in \.parquet, \.arrow"):
        documents(make(f"{tmp_path}/*"))


def test_identity_follows_content_and_not_time(tmp_path):
    file = write(tmp_path / "a.jsonl")
    before = find_input("x", make(file), 1 << 30).identity
    file.touch()
    assert find_input("x", make(file), 1 << 30).identity == before
    file.write_text(file.read_text().replace("text 7", "text 8"))
    assert find_input("x", make(file), 1 << 30).identity != before
