"""A checkpoint folder: its manifest, which says what lies where and proves itself, and its files. Torch-free.

manifest.json is one line of JSON with sorted keys:

    format, step, written (UTC), layout (world, engine, expert_parallel, tensor_parallel, zero_stage), config, kinds,
    what the writer was told (FACTS),
    files: [{file, sha256, bytes, parts: [{name, box: {start, shape}, range: [a, b], key}]}],
    sha256: of the same line without this key

A part holds elements a..b, row by row, of a box of tensor `name`, as tensors KIND/KEY of its file: one of each of the
checkpoint's kinds that training keeps of it (mm_train.optim_groups; of a buffer the weight alone). Boxes of a tensor
are equal or share nothing; the parts of a checkpoint together hold every element of the network once. An averaged
checkpoint (average.py) lists what went in under `average`.
"""

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations, groupby
from pathlib import Path
from typing import Any, NamedTuple

from mm_train import config, inventory
from mm_train.checkpoint.boxes import intersection
from mm_train.checkpoint.files import sha256
from mm_train.cli import UserError
from mm_train.files import sync
from mm_train.inventory import KINDS
from mm_train.optim_groups import kinds_of
from mm_train.sharding import Box, whole

FORMAT, OLD_FORMAT = "mobilemoe-checkpoint-2", "mobilemoe-checkpoint-1"
FACTS = ("samples", "rows_per_step", "updates", "data", "anomalies")  # that a run needs to go on
RNG = "rng/torch"  # key of torch's random state, in the first file
MANIFEST = "manifest.json"
FILE = re.compile(r"rank-\d{5}\.safetensors")
SHA256 = re.compile(r"[0-9a-f]{64}")
MAX_MANIFEST_BYTES = 1 << 30
MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR)


class Damaged(UserError):
    """A checkpoint that is not as it was written. `short` leaves out the path of its folder."""

    def __init__(self, folder: Path, file: str, why: object) -> None:
        super().__init__(f"checkpoint {folder} is damaged: {file}: {why}")
        self.short = f"checkpoint {folder.name} is damaged: {file}: {why}"


def unreadable(folder: Path, file: str, error: OSError) -> UserError:
    """What to raise for a file of a checkpoint that cannot be read: Damaged only when it is missing.

    Everything else (an I/O error, a stale handle, no permission) may pass: the checkpoint may be good, and a run that
    went on from an older one would in time remove it.
    """
    if error.errno in MISSING:
        return Damaged(folder, file, error.strerror or error)
    return UserError(f"cannot read {folder / file}: {error.strerror or error}; nothing was changed")


class Part(NamedTuple):
    """Elements start..stop of a box of a tensor, in one file."""

    name: str
    box: Box
    start: int
    stop: int
    key: str

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "box": {"start": self.box.start, "shape": self.box.shape},
            "range": [self.start, self.stop],
            "key": self.key,
        }


class Record(NamedTuple):
    """A file of a checkpoint."""

    file: str
    sha256: str
    bytes: int
    parts: tuple[Part, ...]

    def to_json(self) -> dict[str, Any]:
        return self._asdict() | {"parts": [part.to_json() for part in self.parts]}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint folder whose manifest is in order and whose files have their lengths."""

    folder: Path
    manifest: dict[str, Any]
    records: tuple[Record, ...]
    run_config: config.Config  # of the run that wrote it, resolved

    @property
    def step(self) -> int:
        return self.manifest["step"]

    @property
    def kinds(self) -> tuple[str, ...]:
        """Which kinds of tensors it holds; the weights alone when it was converted for release."""
        return tuple(self.manifest["kinds"])

    @cached_property
    def kinds_of(self) -> dict[str, tuple[str, ...]]:
        """Of each tensor by name, those that it holds: what the optimizer of the run keeps."""
        cfg, kinds = self.run_config, self.kinds
        found = {entry.name: kinds_of(entry, cfg.optim) for entry in inventory.tensors(cfg.model)}
        return {name: tuple(kind for kind in kept if kind in kinds) for name, kept in found.items()}

    @property
    def bytes(self) -> int:
        return sum(record.bytes for record in self.records)


def name_of_step(step: int) -> str:
    """Folder name of a checkpoint."""
    return f"step-{step:08d}"


def _line(values: dict[str, Any]) -> bytes:
    return json.dumps(values, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"


def write_manifest(folder: Path, values: dict[str, Any]) -> str:
    """Write manifest.json of `values`; returns its digest. Raises OSError."""
    digest = hashlib.sha256(_line(values)).hexdigest()
    path = folder / MANIFEST
    path.write_bytes(_line(values | {"sha256": digest}))
    sync(path)
    return digest


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a checkpoint folder. Raises Damaged, or UserError for another format or a failure to read."""
    path = folder / MANIFEST
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise Damaged(folder, MANIFEST, f"it has {path.stat().st_size:,} bytes")
        data = path.read_bytes()
        values = json.loads(data)
    except OSError as error:
        raise unreadable(folder, MANIFEST, error) from None
    except (ValueError, RecursionError):
        raise Damaged(folder, MANIFEST, "it is not JSON") from None
    if not isinstance(values, dict):
        raise Damaged(folder, MANIFEST, "it is not a JSON object")
    if values.get("format") == OLD_FORMAT:
        raise UserError(
            f"checkpoint {folder} is of the format {OLD_FORMAT}; this version reads {FORMAT} only: train anew in"
            " another run.dir, or read it with the version that wrote it"
        )
    try:
        digest = hashlib.sha256(_line({k: v for k, v in values.items() if k != "sha256"})).hexdigest()
        intact = values.get("sha256") == digest and data == _line(values)
    except (ValueError, TypeError):  # NaN, or keys that do not sort
        intact = False
    if not intact:
        raise Damaged(folder, MANIFEST, "it does not have the sha256 that it says of itself")
    if values.get("format") != FORMAT:
        raise UserError(
            f"checkpoint {folder} is of the format {values.get('format')!r:.60}; this version reads {FORMAT}"
        )
    return values


def open_checkpoint(folder: Path, run_config: config.Config | None = None) -> Checkpoint:
    """Read and check the manifest, and the lengths of the files. `run_config`: that in the manifest, when it is known.

    Raises Damaged, or UserError for another format, a config that this version does not know and a failure to read.
    """
    manifest = read_manifest(folder)
    try:
        _whole_number(manifest["step"]), manifest["config"]
        if manifest["kinds"] not in (list(KINDS), ["weight"]):
            raise ValueError(f"{manifest['kinds']!r:.80} are not kinds of tensors")
        records = tuple(_record(values) for values in manifest["files"])
        if len({record.file for record in records}) != len(records):
            raise ValueError("a file occurs twice")
    except (ValueError, TypeError, KeyError) as error:
        raise Damaged(folder, MANIFEST, f"{type(error).__name__}: {error}") from None
    for record in records:
        path = folder / record.file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise unreadable(folder, record.file, error) from None
        if size != record.bytes:
            raise Damaged(folder, record.file, f"it has {size:,} bytes instead of {record.bytes:,}")
    run_config = run_config or config.from_dict(manifest["config"], str(folder))  # takes some 50 ms
    trouble = coverage_trouble(run_config.model, (part for record in records for part in record.parts))
    if trouble:
        raise Damaged(folder, MANIFEST, trouble)
    return Checkpoint(folder, manifest, records, run_config)


def _record(values: dict[str, Any]) -> Record:
    file, digest = values["file"], values["sha256"]
    if not isinstance(file, str) or not FILE.fullmatch(file) or Path(file).name != file:
        raise ValueError(f"{file!r:.80} is not the name of a file of a checkpoint")
    if not isinstance(digest, str) or not SHA256.fullmatch(digest):
        raise ValueError(f"{digest!r:.80} is not a sha256")
    return Record(file, digest, _whole_number(values["bytes"]), tuple(_part(part) for part in values["parts"]))


def _part(values: dict[str, Any]) -> Part:
    name, key = values["name"], values["key"]
    if not isinstance(name, str) or not isinstance(key, str):
        raise ValueError(f"{name!r:.80} or {key!r:.80} is not a name")
    box = Box(*(tuple(map(_whole_number, values["box"][side])) for side in ("start", "shape")))
    start, stop = map(_whole_number, values["range"])
    if len(box.start) != len(box.shape) or not start <= stop <= box.size:
        raise ValueError(f"elements {start} to {stop} of {box} of {name:.80}")
    return Part(name, box, start, stop, key)


def _whole_number(value: Any) -> int:
    if type(value) is not int or value < 0:
        raise ValueError(f"{value!r:.80} is not a count")
    return value


def coverage_trouble(model: config.Model, parts: Iterable[Part]) -> str | None:
    """What is wrong unless the parts hold every element of the network's tensors exactly once; None when they do."""
    found: dict[str, list[Part]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    for entry in inventory.tensors(model):
        mine = sorted(found.pop(entry.name, []), key=lambda part: (part.box, part.start))
        everything = whole(entry.shape)
        for part in mine:
            if len(part.box.shape) != len(entry.shape) or intersection(part.box, everything) != part.box:
                return f"{part.box} is no part of {entry.name}, which has shape {entry.shape}"
        twice = _shared(mine)
        if twice:
            return f"it holds {twice:,} of the {entry.size:,} elements of {entry.name} twice"
        held = sum(part.stop - part.start for part in mine)
        if held < entry.size:
            return f"it holds {held:,} of the {entry.size:,} elements of {entry.name}"
    return f"{next(iter(found)):.80} is no tensor of this network" if found else None


def _shared(parts: Sequence[Part]) -> int:
    """How many elements sorted parts of one tensor hold more than once."""
    boxes = [(box, list(group)) for box, group in groupby(parts, key=lambda part: part.box)]
    shared = sum((both.size for (a, _), (b, _) in combinations(boxes, 2) if (both := intersection(a, b))), 0)
    for _, group in boxes:
        end = 0
        for part in group:
            shared += max(0, min(end, part.stop) - part.start)
            end = max(end, part.stop)
    return shared


def damaged_files(
    folder: Path,
    records: Iterable[Record],
    progress: Callable[[int], object] = lambda size: None,
    threads: int = min(4, os.cpu_count() or 1),
) -> list[Damaged]:
    """Hash files of a checkpoint, some at a time; what is wrong with them. `progress` hears of the bytes.

    Raises UserError for a failure to read.
    """

    def check(record: Record) -> Damaged | None:
        try:
            found = sha256(folder / record.file, progress)
        except OSError as error:
            trouble = unreadable(folder, record.file, error)
            if isinstance(trouble, Damaged):
                return trouble
            raise trouble from None
        right = found == record.sha256
        return None if right else Damaged(folder, record.file, "its sha256 is not the one in the manifest")

    with ThreadPoolExecutor(threads) as pool:
        return [damage for damage in pool.map(check, records) if damage is not None]
