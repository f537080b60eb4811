"""Data sets of any size that take next to no room: sparse files, with tokens only where they are going to be read.

For tests and measurements of what reads shards. A token's value follows from where it is, so it can be told whether the
right ones were read. Torch-free.
"""

import hashlib
import tarfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from tqdm import tqdm

from mm_train.manifest import BLOCK, DTYPES, Manifest, Member, Shard, crc32, write_manifest
from mm_train.shards import TAR_BLOCK
from mm_train.tokenizer import Tokenizer

STEP = BLOCK // 4  # tokens under one checksum


def tokens_at(source: str, begin: int, end: int, vocab_size: int) -> np.ndarray:
    """The tokens [begin, end) of a source, uint32."""
    salt = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=4).digest(), "little")
    mixed = (np.arange(begin, end, dtype=np.uint64) + np.uint64(salt)) * np.uint64(0x9E3779B97F4A7C15)
    return ((mixed >> np.uint64(32)) % np.uint64(vocab_size)).astype(DTYPES["tokens"])


def write_data_set(
    folder: Path,
    num_shards: Mapping[str, int],
    blocks_per_shard: int,
    seq_len: int,
    windows: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
) -> None:
    """A data set folder with a train split for each source of `num_shards`.

    A shard has `blocks_per_shard` x STEP tokens and a document in each STEP. Only `windows`, of `seq_len`, can be read.
    """
    tokenizer.save(folder)
    with tqdm(total=sum(num_shards.values()), desc="simulate", unit="shard", disable=None) as bar:
        for source, count in num_shards.items():
            begins = windows[source] * seq_len
            spans = [
                np.arange(first, last + 1)
                for first, last in zip(begins // STEP, (begins + seq_len) // STEP, strict=True)
            ]
            wanted = np.unique(np.concatenate(spans))  # blocks of the whole source
            borders = np.searchsorted(wanted, np.arange(count + 1) * blocks_per_shard)
            target = folder / source / "train"
            target.mkdir(parents=True)
            shards = []
            for index in range(count):
                mine = wanted[borders[index] : borders[index + 1]] - index * blocks_per_shard
                shards.append(_write_shard(target, source, index, blocks_per_shard, mine, tokenizer.vocab_size))
                bar.update()
            _write_manifest(target, source, shards, tokenizer)


def _write_shard(folder: Path, source: str, index: int, blocks: int, wanted: np.ndarray, vocab_size: int) -> Shard:
    offsets = np.arange(blocks + 1, dtype=DTYPES["offsets"]) * np.uint64(STEP)
    sizes = {
        "tokens": blocks * BLOCK,
        "offsets": offsets.nbytes,
        "index": 4 * (blocks + -(-offsets.nbytes // BLOCK) + blocks + 1),
    }
    members, end = {}, 0
    for name, size in sizes.items():
        members[name] = Member(end + TAR_BLOCK, size)
        end += TAR_BLOCK + -(-size // TAR_BLOCK) * TAR_BLOCK
    size = -(-(end + 2 * TAR_BLOCK) // tarfile.RECORDSIZE) * tarfile.RECORDSIZE
    crcs = np.zeros(blocks, dtype=DTYPES["index"])
    with (folder / f"{index:05d}.tar").open("wb") as file:
        file.truncate(size)
        checksum = 0
        if len(wanted):
            for name, member in members.items():
                header = tarfile.TarInfo(f"{source}-train-{index:05d}.{name}")
                header.size = member.size
                file.seek(member.offset - TAR_BLOCK)
                file.write(header.tobuf(tarfile.USTAR_FORMAT))
            for block in wanted.tolist():
                begin = (index * blocks + block) * STEP
                data = tokens_at(source, begin, begin + STEP, vocab_size).tobytes()
                crcs[block] = crc32(data)
                file.seek(members["tokens"].offset + block * BLOCK)
                file.write(data)
            file.seek(members["offsets"].offset)
            file.write(offsets.tobytes())
            of_offsets = [crc32(offsets.tobytes()[i : i + BLOCK]) for i in range(0, offsets.nbytes, BLOCK)]
            content = np.concatenate([crcs, of_offsets, np.arange(blocks + 1)]).astype(DTYPES["index"]).tobytes()
            checksum = crc32(content)
            file.seek(members["index"].offset)
            file.write(content)
    sha256 = hashlib.sha256(f"{source} {index}".encode()).hexdigest()  # nobody hashes holes
    return Shard(f"{index:05d}.tar", size, sha256, blocks * STEP, blocks, members, checksum)


def _write_manifest(folder: Path, source: str, shards: list[Shard], tokenizer: Tokenizer) -> None:
    tokens = sum(shard.num_tokens for shard in shards)
    manifest = Manifest(
        source=source,
        split="train",
        licence="CC0-1.0",
        domain=source,
        layout="stream",
        row_length=None,
        has_mask=False,
        vocab_size=tokenizer.vocab_size,
        tokenizer_sha256=tokenizer.sha256,
        num_tokens=tokens,
        num_padding=0,
        num_documents=sum(shard.num_documents for shard in shards),
        num_bytes=4 * tokens,
        shards=shards,
        extra={},
    )
    write_manifest(folder, manifest)
