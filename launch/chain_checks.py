"""What would make a chain fail later is looked for before anything is queued. Torch-free.

A check either raises UserError, one line that says what to mend, or yields notes: what could not be looked at from
here. Nothing is written but an empty file that is removed at once, to see whether a folder takes one.
"""

import contextlib
import difflib
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from launch import slurm_queue
from launch.chain_jobs import Job
from launch.site_file import Site, slurm_hours
from mm_train.cli import UserError

RECORD = "chain.json"  # in OUT: what was queued


def place(script: Path) -> None:
    """Raise UserError unless this is the project's folder: batch scripts and configuration are found from here."""
    if not script.is_file():
        raise UserError(
            f"{script} is not here ({Path.cwd()}): run this in the project's folder, which the nodes see too"
        )


def files(site: Site, folders: Iterable[Path]) -> Iterator[str]:
    """Folders that are written, the container, the interpreter, scratch."""
    for folder in folders:
        writable(folder, "the run folder")
    image = site.text("MM_CONTAINER_IMAGE")
    if image and (image.startswith(("/", "./", "../", "~")) or image.endswith((".sqsh", ".sif"))):
        if not Path(image).expanduser().is_file():
            raise UserError(f"MM_CONTAINER_IMAGE={image}: there is no such file (make it with enroot import)")
    elif image:
        yield f"MM_CONTAINER_IMAGE={image} is in a registry: not looked for"
    mounts = [mount.split(":")[0] for mount in site.text("MM_CONTAINER_MOUNTS").split(",")]
    for mount in mounts:
        if mount and not Path(mount).exists():
            yield f"MM_CONTAINER_MOUNTS: {mount} is not on this machine; the nodes must have it"
    python = site.text("MM_PYTHON")
    if python.startswith("/") and not image and not os.access(python, os.X_OK):
        raise UserError(f"MM_PYTHON={python}: there is no such program")
    scratch = site.text("MM_SCRATCH")
    if scratch and Path(scratch).exists():
        writable(Path(scratch), "MM_SCRATCH")
    elif scratch:
        yield f"MM_SCRATCH={scratch} is not on this machine: each node has to have it"


def writable(folder: Path, what: str) -> None:
    """Raise UserError when a file could not be written into a folder, or where it would be made."""
    nearest = folder
    while not nearest.exists() and nearest != nearest.parent:
        nearest = nearest.parent
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        missing = "" if nearest == folder else f" (for {folder})"
        raise UserError(f"{what} cannot be written: {nearest}{missing}: {error.strerror or error}") from None


def cluster(site: Site, jobs: Sequence[Job]) -> Iterator[str]:
    """Partition, account, node counts and limits, as SLURM has them."""
    found = slurm_queue.partitions()
    for key in ("MM_PARTITION", "MM_CPU_PARTITION"):
        name = site.text(key)
        for part in filter(None, name.split(",")):
            if part not in found:
                near = difflib.get_close_matches(part, found, n=1)
                known = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(found))}"
                raise UserError(f"{key}={part}: this cluster has no such partition ({known})")
    for job in jobs:
        _fits(job, found)
    yield from _account(site.text("MM_ACCOUNT"))
    for job in jobs:  # SLURM's own opinion, which queues nothing
        try:
            slurm_queue.call("sbatch", "--test-only", *job.flags, str(job.script), *job.words)
        except slurm_queue.Unreachable:
            raise
        except UserError as error:
            away = slurm_queue.nodes_away() if "node configuration is not available" in str(error) else 0
            if not away:
                raise UserError(f"SLURM would refuse the job {job.name}: {error}") from None
            # sbatch takes such a job all the same, and it waits
            yield f"{job.name}: {error} ({away} nodes of the cluster are down or drained: it waits for them)"


def _fits(job: Job, partitions: dict[str, dict[str, str]]) -> None:
    """Raise UserError for more nodes or a longer limit than the job's partition has."""
    flags = dict(flag.split("=", 1) for flag in job.flags if flag.startswith("--") and "=" in flag)
    name = flags.get("--partition") or next((n for n, facts in partitions.items() if facts.get("Default") == "YES"), "")
    facts = partitions.get(name)
    if facts is None:  # several, or no default: SLURM decides
        return
    nodes, state = int(flags.get("--nodes", 1)), facts.get("State", "UP")
    if state != "UP":
        raise UserError(f"partition {name} is {state}: jobs are not taken there now")
    most = [int(facts[key]) for key in ("MaxNodes", "TotalNodes") if facts.get(key, "").isdecimal()]
    if most and nodes > min(most):
        raise UserError(f"{job.name} asks for {nodes} nodes; partition {name} gives {min(most)} at most")
    limit, asked = slurm_hours(facts.get("MaxTime", "")), slurm_hours(flags.get("--time", ""))
    if limit is not None and asked is not None and asked > limit:
        raise UserError(
            f"{job.name} asks for {flags['--time']}; partition {name} gives {facts['MaxTime']} at most: set MM_TIME to"
            " that, and the job is requeued until it is done"
        )


def _account(account: str) -> Iterator[str]:
    if not account:
        return
    try:
        known = slurm_queue.accounts()
    except UserError as error:
        yield f"MM_ACCOUNT={account} could not be looked up ({error}); only sbatch can say whether it is valid"
        return
    if account not in known:
        yours = f"yours: {', '.join(sorted(known))}" if known else "you have none"
        raise UserError(f"MM_ACCOUNT={account}: not an account of yours ({yours})")


def not_queued(out: Path) -> None:
    """Raise UserError when jobs that were queued before for this folder are not over yet."""
    alive = []
    for job in recorded(out).get("jobs", []):
        states = [state for state in slurm_queue.job_states(str(job["job"])) if not state.is_over]
        if states:
            alive.append((str(job["job"]), f"{job['job']} ({job['name']}, {states[0].state})"))
    if alive:
        raise UserError(
            f"{out} is queued already: jobs {', '.join(text for _, text in alive)}; look at it with python -m"
            f" launch.status {out}, or scancel {' '.join(job for job, _ in alive)} first"
        )


def recorded(out: Path) -> dict[str, Any]:
    """OUT/chain.json; {} when there is none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        content = json.loads((out / RECORD).read_text(encoding="utf-8"))
        if isinstance(content, dict):
            return content
    return {}
