"""Reads every byte of a data set and says everything that is wrong with it, a line each.

Of each shard: its sha256 and size, the tar's members (names, places), the checksums of all blocks, documents that
follow one another without gaps, token ids within the vocabulary, whole rows where the source is packed. Of a source:
shards that are missing, left over, or there twice, and another tokenizer than the data set's. The exit status is 0 when
all is well, and 2 otherwise.
"""

import argparse
import hashlib
import sys
import tarfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

import numpy as np
from tqdm import tqdm

from mm_train.cli import UserError, command
from mm_train.manifest import DTYPES, NAME, Manifest, Shard, check_one_tokenizer, read_manifest
from mm_train.remote import RemoteFolder, is_url
from mm_train.shard_file import LocalShard, wrong_size
from mm_train.tokenizer import load_tokenizer

EXAMPLES = """examples:
  python -m data_prep.verify data/quickstart
  python -m data_prep.verify data/pretrain/web/train --workers 16
"""
PIECE = 1 << 20  # bytes hashed at a time, elements looked at at a time


def verify(folder: Path, workers: int, say: Callable[[str], object]) -> tuple[int, int]:
    """Check a data set folder or one SOURCE/SPLIT of it; tells `say` of each problem as it is found.

    Returns (shards, problems). Raises UserError when there is nothing to check.
    """
    single = (folder / NAME).is_file()
    splits = [folder] if single else sorted({file.parent for file in folder.glob("*/*/*") if _belongs(file)})
    if not splits:
        raise UserError(f"no data set in {folder}: expected SOURCE/SPLIT folders as data_prep.run writes them")
    problems = 0

    def tell(problem: str) -> None:
        nonlocal problems
        problems += 1
        say(problem)

    manifests: dict[Path, Manifest] = {}
    for split in splits:
        try:
            manifests[split] = read_manifest(split)
        except UserError as error:
            tell(str(error))
    root = splits[0].resolve().parent.parent
    for split, manifest in manifests.items():
        for problem in _of_the_source(split, manifest, root):
            tell(problem)
    work = [(split, manifest, shard) for split, manifest in manifests.items() for shard in manifest.shards]
    with (
        tqdm(
            total=sum(shard.size for *_, shard in work), desc="verify", unit="B", unit_scale=True, disable=None
        ) as bar,
        ThreadPoolExecutor(workers) as pool,  # hashing leaves the interpreter to the other threads
    ):
        for found in pool.map(lambda job: list(_of_the_shard(job[0], job[1], job[2], bar.update)), work):
            for problem in found:
                tell(problem)
    return len(work), problems


def _belongs(file: Path) -> bool:
    return file.name == NAME or file.suffix == ".tar"


def _of_the_source(folder: Path, manifest: Manifest, root: Path) -> Iterator[str]:
    """What can be said without opening a shard."""
    listed = {shard.file for shard in manifest.shards}
    for file in sorted(folder.glob("*.tar")):
        if file.name not in listed:
            yield f"{file} is not in the manifest"
    by_content: dict[str, str] = {}
    for shard in manifest.shards:
        other = by_content.setdefault(shard.sha256, shard.file)
        if other != shard.file:
            yield f"duplicate shard {folder / shard.file}: the same content as {other}"
    if (manifest.source, manifest.split) != folder.resolve().parts[-2:]:
        yield f"{folder} holds the shards of {manifest.source}/{manifest.split}"
    if not manifest.licence:
        yield f"{folder} states no licence"
    try:
        check_one_tokenizer([manifest], load_tokenizer(root).sha256)
    except UserError as error:
        yield f"{folder}: {error}"
    padded = 0 if manifest.row_length is None else manifest.num_tokens % manifest.row_length
    if padded:
        yield f"{folder}: {manifest.num_tokens} tokens are not whole rows of {manifest.row_length}"


def _of_the_shard(folder: Path, manifest: Manifest, shard: Shard, progress: Callable[[int], object]) -> Iterator[str]:
    file = folder / shard.file
    try:
        with file.open("rb") as content:
            size, found = file.stat().st_size, hashlib.sha256()
            while piece := content.read(PIECE):
                found.update(piece)
                progress(len(piece))
        if size != shard.size:
            yield str(wrong_size(str(file), size, shard.size))
        elif found.hexdigest() != shard.sha256:
            yield f"corrupt shard {file}: sha256 {found.hexdigest()}, expected {shard.sha256}"
        yield from _of_the_tar(file, shard)
        if size == shard.size:
            yield from _of_the_content(LocalShard(file, shard, manifest), manifest)
    except FileNotFoundError:
        yield f"missing shard {file}: {shard.size} bytes expected"
    except OSError as error:
        yield f"cannot read {file}: {error.strerror or error}"
    except UserError as error:  # a block's checksum
        yield str(error)


def _of_the_tar(file: Path, shard: Shard) -> Iterator[str]:
    """Would other programs find what the manifest says, and would unpacking it be safe?"""
    places = set(shard.members.values())
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                path = PurePosixPath(member.name)
                if path.is_absolute() or ".." in path.parts or not member.isfile():
                    yield f"unsafe member {member.name!r} in {file}: only plain files in its own folder belong there"
                places.discard((member.offset_data, member.size))
    except tarfile.TarError as error:
        yield f"{file} is not a tar: {error}"
        return
    for name, place in shard.members.items():
        if place in places:
            yield f"{file} does not hold its {name} where the manifest says, at byte {place.offset}"


def _of_the_content(opened: LocalShard, manifest: Manifest) -> Iterator[str]:
    """Raises UserError for the first block that is not what was written."""
    shard, file = opened.shard, opened.name
    for name, place in shard.members.items():
        count = place.size // np.dtype(DTYPES[name]).itemsize
        for low in range(0, 0 if name == "index" else count, PIECE):
            data = opened.read(name, low, min(count, low + PIECE))
            if name == "tokens" and int(data.max(initial=0)) >= manifest.vocab_size:
                yield f"{file} holds token {data.max()}, and the vocabulary has {manifest.vocab_size}"
                break
            if name == "mask" and int(data.max(initial=0)) > 1:
                yield f"{file} has a mask of {data.max()}; it is 0 or 1"
                break
    offsets = opened.read("offsets", 0, shard.members["offsets"].size // 8).astype(np.int64)
    if len(offsets) != shard.num_documents + 1 or offsets[0] != 0 or offsets[-1] != shard.num_tokens:
        yield f"{file} does not hold {shard.num_documents} documents of {shard.num_tokens} tokens, as the manifest says"
    elif (np.diff(offsets) < 1).any():
        yield f"{file} has documents without tokens, or that end before they begin"
    elif manifest.row_length is not None:
        rows = np.arange(0, shard.num_tokens + 1, manifest.row_length)
        if shard.num_tokens % manifest.row_length or not np.isin(rows, offsets).all():
            yield f"{file} has a document across rows of {manifest.row_length} tokens"
    step = manifest.block_bytes // 4
    if opened.first_documents is not None:
        first = np.searchsorted(offsets, np.arange(0, shard.num_tokens + step, step))
        if not np.array_equal(opened.first_documents, first):
            yield f"{file} has an index that does not fit its documents"


@command
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.verify",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="a data set folder, or one SOURCE/SPLIT folder in it")
    parser.add_argument("--workers", type=int, default=2, help="threads (default: %(default)s)")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1")
    if is_url(arguments.folder):
        raise UserError(
            f"{RemoteFolder(arguments.folder)} is not on this machine, and every byte is read here: run this where the "
            "data are, or compare their sha256 alone with python -m data_prep.peek URL --verify"
        )
    shards, problems = verify(Path(arguments.folder), arguments.workers, lambda problem: tqdm.write(problem))
    if problems:
        raise UserError(f"{arguments.folder}: {problems} problem(s) in {shards} shard(s)")
    print(f"{arguments.folder}: {shards} shard(s) intact")
    return 0


if __name__ == "__main__":
    sys.exit(main())
