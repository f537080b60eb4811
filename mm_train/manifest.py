"""What is known about one source and split before any shard of it is opened. Torch-free.

manifest.json is JSON with a shard a line, so that people can read it and tens of thousands of shards load in a second.
It proves itself: `checksum` is the sha256 of the file with the checksum's own digits written as zeros. Format 1, of
before, kept the checksums of all blocks in it; it is still read.
"""

import contextlib
import gc
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from mm_train.cli import UserError
from mm_train.files import write_atomic

try:  # the same numbers, three times as fast
    from isal.isal_zlib import crc32
except ImportError:
    from zlib import crc32

NAME = "manifest.json"
FORMAT, FORMAT_1 = "mobilemoe-shards-2", "mobilemoe-shards-1"
BLOCK, BLOCK_1 = 1 << 14, 1 << 20  # bytes under one crc32
DTYPES = {"tokens": "<u4", "offsets": "<u8", "mask": "u1", "index": "<u4"}
UNSIGNED = "0" * 64


class Member(NamedTuple):
    """Where one array lies in its shard, in bytes."""

    offset: int
    size: int


class Shard(NamedTuple):
    """One tar: file name, size in bytes, sha256 of the file, what it holds and where.

    `index_crc32` is that of the member `index`, which has the checksums of the others; in format 1 there is no such
    member, and `crc32` has them.
    """

    file: str
    size: int
    sha256: str
    num_tokens: int
    num_documents: int
    members: dict[str, Member]
    index_crc32: int = 0
    crc32: dict[str, list[int]] | None = None


@dataclass(frozen=True)
class Manifest:
    """Everything known about one source and split. `sha256` is that of the manifest file and identifies the data."""

    source: str
    split: str
    licence: str
    domain: str
    layout: str  # stream | packed
    row_length: int | None
    has_mask: bool
    vocab_size: int
    tokenizer_sha256: str
    num_tokens: int  # padding included
    num_padding: int
    num_documents: int  # padding is not a document here
    num_bytes: int  # of UTF-8 text that went in
    shards: list[Shard]
    extra: dict[str, Any]
    revision: str | None = None  # of the data set that the text is from
    config_sha256: str | None = None  # of the configuration that the shards were made by
    block_bytes: int = BLOCK
    sha256: str = ""

    def num_windows(self, seq_len: int) -> int:
        """How many windows of `seq_len` inputs there are (each holds one token more, for the labels).

        Raises UserError for packed rows of another length.
        """
        if self.row_length is None:
            return max(0, (self.num_tokens - 1) // seq_len)
        if self.row_length != seq_len + 1:
            raise UserError(
                f"source {self.source}/{self.split} is packed in rows of {self.row_length} tokens, which suits a"
                f" sequence length of {self.row_length - 1}, not {seq_len}: change the sequence length or prepare with"
                f" row_length {seq_len + 1}"
            )
        return self.num_tokens // self.row_length


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Write manifest.json whole or not at all; returns the manifest with its sha256. Raises OSError."""
    data = serialise(manifest)
    write_atomic(folder / NAME, data)
    return parse_manifest(data, str(folder / NAME))


def serialise(manifest: Manifest) -> bytes:
    """The file of a manifest, in the current format."""
    facts = {f.name: getattr(manifest, f.name) for f in fields(Manifest) if f.name not in ("shards", "sha256")}
    head = json.dumps({"format": FORMAT, "checksum": UNSIGNED, **facts}, indent=1).removesuffix("\n}")
    shards = [
        {**shard._asdict(), "members": {name: list(member) for name, member in shard.members.items()}}
        for shard in manifest.shards
    ]
    for shard in shards:
        del shard["crc32"]
    lines = ",\n".join("  " + json.dumps(shard) for shard in shards)
    data = f'{head},\n "shards": [\n{lines}\n ]\n}}\n'.encode()
    return data.replace(UNSIGNED.encode(), hashlib.sha256(data).hexdigest().encode(), 1)


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a SOURCE/SPLIT folder. Raises UserError when it is missing, damaged or of another format."""
    file = folder / NAME
    try:
        data = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        raise missing(str(folder)) from None
    return parse_manifest(data, str(file))


def missing(folder: str) -> UserError:
    return UserError(f"no shards in {folder}: {NAME} is missing (not prepared, or the preparation was cut short)")


def parse_manifest(data: bytes, file: str) -> Manifest:
    """The manifest out of the content of `file`. Raises UserError when it is damaged or of another format."""
    try:
        with no_garbage_collection():
            manifest = _parse(data, file)
            _check(manifest)
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"damaged manifest {file}: {error}; prepare the data again") from None
    return manifest


def _parse(data: bytes, file: str) -> Manifest:
    content = json.loads(data)
    version = content.pop("format")
    if version not in (FORMAT, FORMAT_1):
        raise UserError(f"{file} is not in the format {FORMAT}: prepare the data with this version")
    checksum = content.pop("checksum")
    if checksum != (_signature(data, checksum) if version == FORMAT else _signature_1(content)):
        raise ValueError("its checksum does not match its content")
    lines = content.pop("shards")
    shards = [_shard(line) if version == FORMAT else _shard_1(line) for line in lines]
    if version == FORMAT_1:
        content["block_bytes"] = BLOCK_1
    return Manifest(**content, shards=shards, sha256=hashlib.sha256(data).hexdigest())


@contextlib.contextmanager
def no_garbage_collection() -> Iterator[None]:
    """For making hundreds of thousands of objects that stay: looking through them for cycles doubles the time."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _signature(data: bytes, checksum: str) -> str:
    return hashlib.sha256(data.replace(checksum.encode(), UNSIGNED.encode(), 1)).hexdigest()


def _signature_1(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _shard(line: dict[str, Any]) -> Shard:
    members = line.pop("members")
    places = map(Member._make, members.values())
    return Shard(**line, members=dict(zip(members, places, strict=True)))


def _shard_1(line: dict[str, Any]) -> Shard:
    members = line.pop("members")
    places = {name: Member(member["offset"], member["size"]) for name, member in members.items()}
    return Shard(**line, members=places, crc32={name: member["crc32"] for name, member in members.items()})


def _check(manifest: Manifest) -> None:
    """Raises ValueError for what no writer writes: a reader trusts these numbers with memory maps."""
    named = {"tokens", "offsets", *(["mask"] if manifest.has_mask else [])}
    indexed = {*named, "index"}
    for index, shard in enumerate(manifest.shards):
        if shard.file != f"{index:05d}.tar":
            raise ValueError("its shards are not 00000.tar, 00001.tar, ... in its own folder")
        members, size = shard.members, shard.size
        if members.keys() != (indexed if shard.crc32 is None else named):
            raise ValueError(f"{shard.file} has the members {', '.join(members)}")
        if members["tokens"].size != 4 * shard.num_tokens or members["offsets"].size < 8:
            raise ValueError(f"{shard.file} does not hold the {shard.num_tokens} tokens that it says")
        if any(offset < 0 or length < 0 or offset + length > size for offset, length in members.values()):
            raise ValueError(f"a member of {shard.file} lies outside of it")
    if sum(shard.num_tokens for shard in manifest.shards) != manifest.num_tokens:
        raise ValueError(f"its shards do not add up to {manifest.num_tokens} tokens")


def check_one_tokenizer(manifests: Iterable[Manifest], tokenizer_sha256: str | None = None) -> None:
    """Raise UserError unless all sources were encoded with one tokenizer (that with `tokenizer_sha256`, if given)."""
    expected, owner = tokenizer_sha256, "the tokenizer in use"
    for manifest in manifests:
        name = f"source {manifest.source}/{manifest.split}"
        if expected is None:
            expected, owner = manifest.tokenizer_sha256, name
        if manifest.tokenizer_sha256 != expected:
            raise UserError(
                f"tokenizer mismatch: {name} was encoded with {manifest.tokenizer_sha256[:12]}, "
                f"{owner} has {expected[:12]}; prepare them with one tokenizer"
            )


def block_crcs(data: memoryview, block: int) -> list[int]:
    """crc32 of every started block of `data`."""
    return [crc32(data[start : start + block]) for start in range(0, len(data), block)]
