"""A checkpoint written anew: into another number of files of about equal size, or its weights alone."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor
from tqdm import tqdm

from mm_train.checkpoint import files
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.format import RNG, Part, open_checkpoint, write_manifest
from mm_train.checkpoint.reader import Reader
from mm_train.checkpoint.share import as_bytes
from mm_train.cli import UserError
from mm_train.files import is_file, sync
from mm_train.inventory import KINDS
from mm_train.sharding import Box, whole

PIECE = 1 << 22  # elements in memory at a time
Read = Callable[[str, str, Box, int, int], Tensor]  # what Reader.read_range takes and returns


class Vector(NamedTuple):
    """A tensor of a new file: a part of one kind."""

    kind: str
    part: Part


def convert(source: Path, out: Path, number: int, weights_only: bool) -> Path:
    """Write the newest checkpoint of `source` (a run or checkpoint folder) to the new folder `out`; returns it.

    The source is verified before, and read piece by piece. `out` appears whole or not at all. Raises UserError for a
    damaged source, when `out` exists, or when it cannot be written.
    """
    if number < 1:
        raise UserError(f"--files is {number}; it must be at least 1")
    refuse_existing(out)
    reader = Reader(find(source)).verify()
    rewrite(reader, out, number, KINDS[:1] if weights_only else reader.kinds, reader.read_range)
    return out


def refuse_existing(out: Path) -> None:
    """Raise UserError when there is something at `out`."""
    if out.exists():
        raise UserError(f"{out} exists already: choose another place, or remove it")


def rewrite(
    reader: Reader,
    out: Path,
    number: int,
    kinds: tuple[str, ...],
    read: Read,
    more: dict[str, Any] | None = None,
) -> None:
    """Write a checkpoint like that of `reader` to the new folder `out`, with the values that `read` returns.

    `more` goes into its manifest. `out` appears whole or not at all. Raises UserError when it cannot be written.
    """
    partial = out.with_name(out.name + ".partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(reader, partial, number, kinds, read, more or {})
        open_checkpoint(partial)
        os.rename(partial, out)
        sync(out.parent)
    except OSError as error:
        raise UserError(f"cannot write {out}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(reader: Reader, folder: Path, number: int, kinds: tuple[str, ...], read: Read, more: dict[str, Any]) -> None:
    """All files of the new checkpoint."""
    records = []
    shares = split(reader, number)
    held = {name: [kind for kind in kinds if kind in kept] for name, kept in reader.kinds_of.items()}
    total = sum((part.stop - part.start) * len(held[part.name]) for share in shares for part in share)
    with tqdm(total=4 * total, unit="B", unit_scale=True, desc=folder.stem, disable=None, leave=False) as bar:
        for index, share in enumerate(shares):
            vectors = [Vector(kind, part) for kind in kinds for part in share if kind in held[part.name]]
            listed = [files.Vector(f"{v.kind}/{v.part.key}", "F32", v.part.stop - v.part.start) for v in vectors]
            if index == 0:
                listed.append(files.Vector(RNG, "U8", reader.rng_state().numel()))
            path = folder / f"rank-{index:05d}.safetensors"
            buffers = _buffers(read, vectors, reader.rng_state() if index == 0 else None, bar)
            sha256, size = files.write(path, files.header(listed), buffers)
            parts = [part.to_json() for part in share]
            records.append({"file": path.name, "sha256": sha256, "bytes": size, "parts": parts})
    values = {key: value for key, value in reader.manifest.items() if key != "sha256"}
    write_manifest(folder, values | more | {"files": records, "kinds": kinds})
    for beside in (reader.folder, reader.folder.parent.parent):  # as mm_train.model_folder looks for it
        if is_file(beside / "tokenizer.json"):
            shutil.copyfile(beside / "tokenizer.json", folder / "tokenizer.json")
            break
    sync(folder)


def split(reader: Reader, number: int) -> list[list[Part]]:
    """All tensors in `number` shares of equally many elements, in the module's order."""
    total = sum(entry.size for entry in reader.entries.values())
    shares: list[list[Part]] = []
    for index in range(number):
        low, high = total * index // number, total * (index + 1) // number
        share, position = [], 0
        for entry in reader.entries.values():
            start, stop = (min(max(end - position, 0), entry.size) for end in (low, high))
            if start < stop:
                share.append(Part(entry.name, whole(entry.shape), start, stop, entry.name))
            position += entry.size
        shares.append(share)
    return shares


def _buffers(read: Read, vectors: list[Vector], rng_state: Tensor | None, bar: tqdm) -> Iterator[memoryview]:
    """The bytes of a new file, piece by piece."""
    for kind, part in vectors:
        for start in range(part.start, part.stop, PIECE):
            stop = min(start + PIECE, part.stop)
            yield as_bytes(read(part.name, kind, part.box, start, stop))
            bar.update(4 * (stop - start))
    if rng_state is not None:
        yield as_bytes(rng_state)
