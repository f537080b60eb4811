"""The finished shards of all jobs of a source and split, as the data set that training reads."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data_prep.encode import Job, Progress, shard_folder
from mm_train.cli import UserError
from mm_train.files import publish, sync
from mm_train.manifest import Manifest, read_manifest, write_manifest
from mm_train.shards import ShardReader, ShardWriter


def join(jobs: Sequence[Job], folder: Path, out: Path, extra: dict[str, Any]) -> Manifest:
    """Number the shards of `jobs` through, in order, and put them into OUT/SOURCE/SPLIT in place of what is there.

    They are moved to `folder`, on the same file system, and from there as a whole. If it is cut short anywhere, calling
    it again completes it.
    """
    first = jobs[0]
    target, place = out / first.source / first.split, folder / first.source / first.split
    with contextlib.suppress(UserError):
        done = ShardReader(target).manifest
        if done.extra.get("key") == extra["key"]:
            return done
    parts = [_shard_manifest(job, shard) for job in jobs for shard in range(finished(job).shards)]
    shards = []
    place.mkdir(parents=True, exist_ok=True)
    for number, (source, manifest) in enumerate(parts):
        (shard,) = manifest.shards
        name = f"{number:05d}.tar"
        if (source / shard.file).is_file():
            os.replace(source / shard.file, place / name)
        shards.append(shard._replace(file=name))
    sync(place)
    # As the writer would have it for a source without documents, then filled in: no fact can be forgotten here.
    empty = ShardWriter(folder / "empty", first.source, first.split, **first.facts).close()
    whole = replace(
        empty,
        num_tokens=sum(manifest.num_tokens for _, manifest in parts),
        num_padding=sum(manifest.num_padding for _, manifest in parts),
        num_documents=sum(manifest.num_documents for _, manifest in parts),
        num_bytes=sum(manifest.num_bytes for _, manifest in parts),
        shards=shards,
        extra=extra,
    )
    write_manifest(place, whole)
    target.parent.mkdir(parents=True, exist_ok=True)
    (target / "manifest.json").unlink(missing_ok=True)  # what is there stops being a data set before it loses shards
    if target.exists():
        shutil.rmtree(target)
    publish(place, target)
    return ShardReader(target).manifest


def finished(job: Job) -> Progress:
    """What `encode` said of a finished job."""
    return Progress(**json.loads((job.folder / "done.json").read_bytes()))


def _shard_manifest(job: Job, shard: int) -> tuple[Path, Manifest]:
    folder = shard_folder(job, shard) / job.source / job.split
    return folder, read_manifest(folder)
