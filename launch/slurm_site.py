"""Settings of the site, as launch/site.example.env explains them, and what they make of a srun command."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.restart import Limits
from mm_train.cli import UserError

LAUNCHERS = ("srun", "torchrun")


@dataclass(frozen=True)
class Site:
    """What the batch script uses of them."""

    python: str
    container: tuple[str, ...]  # flags of srun
    launcher: str
    tasks: int  # training processes of a node
    gpus: int  # of a node
    cpus: str  # of a process; empty: what SLURM gives
    warn_seconds: float  # before the end of the job's time
    limits: Limits
    preflight: bool
    preflight_seconds: float
    disk_gib: float
    scratch: str

    def srun(self, nodes: int, tasks: int, *flags: str) -> list[str]:
        """A step of `tasks` processes on each of `nodes` nodes."""
        command = ["srun", f"--nodes={nodes}", f"--ntasks={nodes * tasks}", f"--ntasks-per-node={tasks}"]
        if self.cpus and tasks == self.tasks:
            command += [f"--cpus-per-task={self.cpus}"]
        return [*command, "--export=ALL", *self.container, *flags]


def read(environment: Mapping[str, str], root: Path, run_dir: Path | None = None) -> Site:
    """The settings. Raises UserError for a value that cannot be right, and for a file that is not there."""
    get = environment.get
    launcher = get("MM_LAUNCHER") or "srun"
    if launcher not in LAUNCHERS:
        raise UserError(f"MM_LAUNCHER is {launcher!r}; it must be {' or '.join(LAUNCHERS)}")
    gpus = number(environment, "MM_GPUS_PER_NODE", number(environment, "SLURM_GPUS_ON_NODE", 0))
    tasks = gpus or number(environment, "MM_TASKS_PER_NODE", number(environment, "SLURM_NTASKS_PER_NODE", 1), least=1)
    python, image = get("MM_PYTHON") or "python3", get("MM_CONTAINER_IMAGE") or ""
    if not image and shutil.which(python) is None:
        raise UserError(f"no Python at {python} (MM_PYTHON)")
    return Site(
        python=python,
        container=container(image, get("MM_CONTAINER_MOUNTS") or "", root, run_dir) if image else (),
        launcher=launcher,
        tasks=tasks,
        gpus=gpus,
        cpus=get("MM_CPUS_PER_GPU") or get("SLURM_CPUS_PER_TASK") or "",
        warn_seconds=number(environment, "MM_SIGNAL_SECONDS", 300),
        limits=Limits(
            restarts=number(environment, "MM_MAX_RESTARTS", 20),
            no_progress=number(environment, "MM_MAX_NO_PROGRESS", 3, least=1),
        ),
        preflight=bool(number(environment, "MM_PREFLIGHT", 1)),
        preflight_seconds=number(environment, "MM_PREFLIGHT_SECONDS", 120, least=10),
        disk_gib=number(environment, "MM_MIN_DISK_GIB", 5),
        scratch=get("MM_SCRATCH") or "",
    )


def container(image: str, mounts: str, root: Path, run_dir: Path | None) -> tuple[str, ...]:
    """pyxis' flags. Raises UserError for an image file that is not there; what a registry has, srun finds out."""
    if image.startswith(("/", "./", "~")) and not os.path.exists(os.path.expanduser(image)):
        raise UserError(f"no container image at {image} (MM_CONTAINER_IMAGE)")
    folders = [str(root)] + ([str(run_dir)] if run_dir else [])
    all_mounts = ",".join([*(f"{folder}:{folder}" for folder in folders), *([mounts] if mounts else [])])
    return (f"--container-image={image}", f"--container-mounts={all_mounts}", f"--container-workdir={root}")


def number(environment: Mapping[str, str], name: str, default: int, least: int = 0) -> int:
    """A whole number of the environment; an empty value is none."""
    value = environment.get(name) or str(default)
    if not value.isdecimal() or int(value) < least:
        raise UserError(f"{name} is {value!r}; it must be a whole number of at least {least}")
    return int(value)
