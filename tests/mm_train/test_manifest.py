import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_train.cli import UserError
from mm_train.manifest import (
    NAME,
    Manifest,
    Member,
    Shard,
    check_one_tokenizer,
    parse_manifest,
    read_manifest,
    serialise,
    write_manifest,
)
from tests.mm_train import shards_format_1


def shard(index: int = 0, **changes) -> Shard:
    members = {"tokens": Member(512, 40), "offsets": Member(1024, 24), "index": Member(2048, 16)}
    return Shard(f"{index:05d}.tar", 10240, "0" * 64, 10, 2, members, 7)._replace(**changes)


def manifest(**changes) -> Manifest:
    facts = {
        "source": "code",
        "split": "train",
        "licence": "CC0-1.0",
        "domain": "code",
        "layout": "stream",
        "row_length": None,
        "has_mask": False,
        "vocab_size": 1000,
        "tokenizer_sha256": "0" * 64,  # as the checksum is written while it is taken
        "num_tokens": 20,
        "num_padding": 0,
        "num_documents": 4,
        "num_bytes": 33,
        "shards": [shard(0), shard(1)],
        "extra": {"key": "k"},
    }
    return Manifest(**{**facts, **changes})


def test_what_is_written_is_read(tmp_path):
    there = manifest(revision="abc", config_sha256="c" * 64, block_bytes=1024)
    written = write_manifest(tmp_path, there)
    assert read_manifest(tmp_path) == written
    assert dataclasses.replace(written, sha256="") == there
    assert [line.strip()[:22] for line in (tmp_path / NAME).read_text().splitlines()[-4:-2]] == [
        '{"file": "00000.tar", ',
        '{"file": "00001.tar", ',
    ]


def test_no_shards(tmp_path):
    assert write_manifest(tmp_path, manifest(shards=[], num_tokens=0)).shards == []


@given(st.data())
def test_any_other_byte_is_found(data):
    content = serialise(manifest())
    place = data.draw(st.integers(0, len(content) - 1))
    other = data.draw(st.integers(0, 255).filter(lambda byte: byte != content[place]))
    with pytest.raises(UserError, match=r"damaged manifest x|not in the format"):
        parse_manifest(content[:place] + bytes([other]) + content[place + 1 :], "x")


@pytest.mark.parametrize("text", ["{", "[]", "\x00", "{}", '{"format": "mobilemoe-shards-2"}', "\ud800", "[" * 100_000])
def test_what_is_no_manifest(text):
    with pytest.raises(UserError, match="damaged manifest x"):
        parse_manifest(text.encode(errors="surrogatepass"), "x")


def test_another_format():
    with pytest.raises(UserError, match="x is not in the format mobilemoe-shards-2: prepare"):
        parse_manifest(b'{"format": "mobilemoe-shards-9"}', "x")


@pytest.mark.parametrize(
    ("lie", "message"),
    [
        ({"file": "../secret.tar"}, "not 00000.tar"),
        ({"file": "/etc/passwd"}, "not 00000.tar"),
        ({"num_tokens": 11}, "does not hold the 11 tokens"),
        ({"size": 100}, "lies outside"),
        ({"members": {"tokens": Member(512, 40), "offsets": Member(1024, 24)}}, "has the members tokens, offsets"),
        ({"members": {**shard().members, "mask": Member(0, 10)}}, "has the members"),
        ({"members": {**shard().members, "tokens": Member(-512, 40)}}, "lies outside"),
    ],
)
def test_a_well_signed_lie_is_refused(lie, message):
    lying = shard(**lie)
    with pytest.raises(UserError, match=f"damaged manifest x: .*{message}"):
        parse_manifest(serialise(manifest(shards=[lying], num_tokens=lying.num_tokens)), "x")


def test_shards_that_do_not_add_up():
    with pytest.raises(UserError, match="do not add up to 21 tokens"):
        parse_manifest(serialise(manifest(num_tokens=21)), "x")


def test_the_first_format_is_read_and_checked(tmp_path):
    folder = shards_format_1.write(tmp_path / "train")
    old = read_manifest(folder)
    assert (old.block_bytes, old.revision, old.extra) == (1 << 20, None, {"key": "k"})
    assert {name: len(crcs) for name, crcs in old.shards[0].crc32.items()} == {"tokens": 1, "offsets": 1, "mask": 1}
    content = json.loads((folder / NAME).read_bytes())
    (folder / NAME).write_text(json.dumps({**content, "num_documents": 5}))
    with pytest.raises(UserError, match="checksum does not match"):
        read_manifest(folder)


def test_one_tokenizer_for_all_sources():
    manifests = [manifest(source=source, tokenizer_sha256=sha * 64) for source, sha in zip("abc", "aab", strict=True)]
    check_one_tokenizer(manifests[:2])
    check_one_tokenizer(manifests[:2], "a" * 64)
    with pytest.raises(UserError, match=r"tokenizer mismatch: source c/train .* source a/train has aaaa"):
        check_one_tokenizer(manifests)
    with pytest.raises(UserError, match="the tokenizer in use has cccc"):
        check_one_tokenizer(manifests, "c" * 64)
