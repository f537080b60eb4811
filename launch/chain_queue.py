"""All jobs of a chain into SLURM's queue, or none: printed, looked at, queued, written down. Torch-free."""

import contextlib
import fcntl
import json
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import chain_checks, chain_jobs, slurm_queue
from launch.chain_jobs import Job
from launch.site_file import Site
from mm_train.cli import UserError
from mm_train.files import write_atomic


def queue(
    out: Path, todo: Sequence[Job], here: Site, facts: dict[str, Any], notes: Sequence[str], dry_run: bool
) -> int:
    """Print the commands, look for what would make them fail, and queue all of them or none."""
    if not todo:
        print("\nnothing is left to do")
        return 0
    for job in todo:
        chain_checks.place(job.script)
    print(f"\n{chain_jobs.shell_script(todo, here)}\n", flush=True)
    for note in notes:
        print(f"note: {note}")
    for note in looked_for(out, todo, here, dry_run):
        print(f"note: {note}", flush=True)
    if dry_run:
        print("nothing was queued (--dry-run)")
        return 0
    with _alone(out):
        chain_checks.not_queued(out)
        ids = submitted(todo, here)
        try:
            _record(out, todo, ids, here, facts)
        except OSError as error:
            why = f"cannot write {out / chain_checks.RECORD}: {error.strerror or error}"
            raise UserError(f"{why}{undo(ids)}") from None
    print("queued: " + ", ".join(f"{name} {job}" for name, job in ids.items()))
    print(f"look: python -m launch.status {out}")
    return 0


def looked_for(out: Path, todo: Sequence[Job], here: Site, dry_run: bool) -> Iterator[str]:
    """What could not be looked at. Raises UserError for what would fail."""
    yield from chain_checks.files(here, [out, *dict.fromkeys(job.folder for job in todo)])
    if slurm_queue.is_here():
        try:
            chain_checks.not_queued(out)
            yield from chain_checks.cluster(here, todo)
        except slurm_queue.Unreachable as error:
            if not dry_run:
                raise
            yield f"{error}: partition, account and limits were not looked at"
    elif dry_run:
        yield "SLURM is not installed here: partition, account and limits were not looked at"
    else:
        raise UserError("sbatch is not installed here: run this on a login node (--dry-run works anywhere)")


def submitted(todo: Sequence[Job], here: Site) -> dict[str, str]:
    """Queue the jobs, in order; returns the id of each. When one is refused, those before it are cancelled."""
    environment = dict(os.environ) | ({"MM_SITE": str(here.path)} if here.path else {})
    ids: dict[str, str] = {}
    for job in todo:
        try:
            job.logs.mkdir(parents=True, exist_ok=True)
            ids[job.name] = slurm_queue.submit(job.command(ids), environment)
        except UserError as error:
            raise UserError(f"SLURM refused the job {job.name}: {error}{undo(ids)}") from None
        except OSError as error:
            raise UserError(f"cannot write {job.logs}: {error.strerror or error}{undo(ids)}") from None
        except BaseException:  # Ctrl-C
            undo(ids)
            raise
    return ids


def undo(ids: dict[str, str]) -> str:
    """Cancel jobs; says so, as the end of an error."""
    if not ids:
        return ""
    try:
        slurm_queue.cancel(list(ids.values()))
    except UserError as error:
        return f"; the jobs before it are queued and could not be cancelled ({error}): scancel {' '.join(ids.values())}"
    return f"; cancelled again: {', '.join(ids)}"


@contextlib.contextmanager
def _alone(out: Path) -> Iterator[None]:
    """One submission into a folder at a time. A file system without locks has none."""
    out.mkdir(parents=True, exist_ok=True)
    with (out / "chain.lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another launch.submit is queueing jobs for {out} at this moment") from None
        except OSError:
            pass
        yield


def _record(out: Path, todo: Sequence[Job], ids: dict[str, str], here: Site, facts: dict[str, Any]) -> None:
    """OUT/chain.json: what was queued, for launch.status and for the next submission."""
    before = chain_checks.recorded(out)
    earlier = before.get("earlier", []) + ([before["jobs"]] if before.get("jobs") else [])
    content = facts | {
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "site": str(here.path) if here.path else None,
        "jobs": [
            {
                "name": job.name,
                "kind": job.kind,
                "job": ids[job.name],
                "after": list(job.after),
                "tasks": job.tasks,
                "folder": str(job.folder),
                "command": job.command(ids),
            }
            for job in todo
        ],
        "earlier": earlier[-20:],
    }
    write_atomic(out / chain_checks.RECORD, (json.dumps(content, indent=1) + "\n").encode())
