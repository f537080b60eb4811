import json
import random
import re
from pathlib import Path

import pytest

from data_prep.collect import collect, read_spool, source_key
from data_prep.config import SourceConfig
from data_prep.sources import LIBRARY
from mm_train.cli import UserError


def make(paths: list[Path], **values) -> SourceConfig:
    return SourceConfig("text_files", "CC0-1.0", "test", paths=[str(path) for path in paths], **values)


def lines(file: Path, texts: list[str]) -> Path:
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return file


def test_every_document_is_kept_or_counted_under_a_reason(tmp_path):
    unanswered = json.dumps({"messages": [{"role": "user", "content": "anyone there?"}]})
    file = lines(tmp_path / "a.jsonl", ["first text", "first text", "second text", " \n", "", "tiny"])
    file.write_text(file.read_text() + unanswered + "\n{\n")
    report = collect("a", make([file], min_bytes=5), 0.0, tmp_path / "spool")
    assert report.kept == {"train": [2, 21], "val": [0, 0]}
    assert report.dropped == {
        "duplicate": [1, 10],
        "empty": [2, 2],
        "shorter than min_bytes": [1, 4],
        "no answer": [1, 13],
        "malformed line": [1, 2],
    }
    assert [item.text for item in read_spool(tmp_path / "spool" / "train.jsonl")] == ["first text", "second text"]


def test_split_is_by_hash_and_near_the_fraction(tmp_path):
    texts = [f"document {i}" for i in range(3000)]
    held_out = []
    for name, order in (("a", texts), ("b", texts[::-1]), ("c", texts[:1500])):
        report = collect(name, make([lines(tmp_path / f"{name}.jsonl", order)]), 0.1, tmp_path / name)
        held_out.append({item.text for item in read_spool(tmp_path / name / "val.jsonl")})
        train = {item.text for item in read_spool(tmp_path / name / "train.jsonl")}
        assert train | held_out[-1] == set(order)
        assert not train & held_out[-1]
        assert report.kept["train"][0] + report.kept["val"][0] == len(order)
    assert held_out[0] == held_out[1]
    assert held_out[2] < held_out[0]
    assert 240 < len(held_out[0]) < 360


def test_all_that_comes_from_one_module_is_on_one_side(tmp_path):
    sides: dict[str, set[str]] = {}
    for kind in ("stdlib_code", "docstring_chat", "machine_docs"):
        source = SourceConfig(kind, "PSF-2.0", "test", exclude=["[!b]*"], parts=["docstrings"])
        collect(kind, source, 0.3, tmp_path / kind)
        for split in ("train", "val"):
            for item in read_spool(tmp_path / kind / f"{split}.jsonl"):
                text = item.text or item.messages[0]["content"]
                for module in ("base64", "bdb", "bisect", "bz2"):
                    if item.text == (LIBRARY / f"{module}.py").read_text() or re.search(rf"(^|`){module}\b", text):
                        sides.setdefault(module, set()).add(split)
    assert {side for found in sides.values() for side in found} == {"train", "val"}
    assert all(len(found) == 1 for found in sides.values())


def test_a_limit_keeps_the_same_documents_whatever_the_order(tmp_path):
    texts = [f"{i} " * random.Random(i).randint(1, 60) for i in range(400)]
    total = sum(map(len, texts))
    kept = []
    for name, order in (("a", texts), ("b", sorted(texts, key=len)), ("c", sorted(texts, key=len)[::-1])):
        report = collect(
            name, make([lines(tmp_path / f"{name}.jsonl", order)], max_bytes=total // 3), 0.0, tmp_path / name
        )
        kept.append((tmp_path / name / "train.jsonl").read_bytes())
        assert 0.9 * total / 3 < report.kept["train"][1] <= total / 3
        assert report.dropped["over the train limit"][0] + report.kept["train"][0] == len(texts)
    assert kept[0] == kept[1] == kept[2]


def test_a_large_document_does_not_keep_the_others_out(tmp_path):
    small = [f"document {i}" for i in range(50)]
    for i in range(8):  # wherever the large one comes in the order of hashes
        large = [f"{i}" * 95, f"{i}" * 200]
        spool = tmp_path / str(i)
        report = collect("a", make([lines(tmp_path / "a.jsonl", large + small)], max_bytes=100), 0.0, spool)
        assert report.kept["train"][1] > 85
        assert large[1] not in {item.text for item in read_spool(spool / "train.jsonl")}


def test_nothing_left_to_train_on(tmp_path):
    file = lines(tmp_path / "a.jsonl", ["", "x"])
    with pytest.raises(
        UserError, match=r"source books is empty: .* \(dropped empty: 1, shorter than min_bytes: 1; held"
    ):
        collect("books", make([file], min_bytes=5), 0.0, tmp_path / "spool")
    assert not (tmp_path / "spool").exists()


def test_finished_work_is_not_repeated(tmp_path):
    file = lines(tmp_path / "a.jsonl", ["some text"])
    first = collect("a", make([file]), 0.0, tmp_path / "spool")
    file.unlink()
    assert collect("a", make([file]), 0.0, tmp_path / "spool") == first


def test_key_follows_content_and_configuration(tmp_path):
    file = lines(tmp_path / "a.jsonl", ["some text"])
    key = source_key(make([file]), 0.1)
    assert source_key(make([file]), 0.1) == key
    file.touch()
    assert source_key(make([file]), 0.1) == key  # a new time is no new content
    assert source_key(make([file]), 0.2) != key
    assert source_key(make([file], min_bytes=2), 0.1) != key
    lines(file, ["other text"])
    assert source_key(make([file]), 0.1) != key
