"""The site file: what is particular to one cluster, as bash KEY=value lines. launch/site.example.env explains the keys.

The batch scripts source the file; here bash reads it too, so that both see the same values, and they become flags of
sbatch, because #SBATCH lines cannot read a file. Torch-free.
"""

import difflib
import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from mm_train.cli import UserError

DEFAULT = Path("launch/site.env")
NUMBERS = {  # keys that are whole numbers, and the smallest that makes sense
    "MM_NODES": 1,
    "MM_GPUS_PER_NODE": 0,
    "MM_TASKS_PER_NODE": 1,
    "MM_CPUS_PER_GPU": 1,
    "MM_CPU_CPUS": 1,
    "MM_SIGNAL_SECONDS": 1,
    "MM_MAX_RESTARTS": 0,
    "MM_MAX_NO_PROGRESS": 1,
    "MM_PREFLIGHT_SECONDS": 10,
    "MM_MIN_DISK_GIB": 0,
}
CHOICES = {"MM_LAUNCHER": ("srun", "torchrun"), "MM_PREFLIGHT": ("1", "0")}
TEXTS = (
    *("MM_PARTITION", "MM_ACCOUNT", "MM_QOS", "MM_TIME", "MM_SBATCH_ARGS", "MM_CPU_PARTITION", "MM_CPU_TIME"),
    *("MM_CONTAINER_IMAGE", "MM_CONTAINER_MOUNTS", "MM_MODULES", "MM_PYTHON", "MM_HOST_PYTHON", "MM_SCRATCH"),
)
KEYS = (*NUMBERS, *CHOICES, *TEXTS)
OTHER = ("MM_KERNELS", "MM_SITE")  # of the project, and no matter of a site file
TIME = re.compile(r"(\d+-)?\d+(:\d+){0,2}|UNLIMITED|infinite", re.IGNORECASE)


@dataclass(frozen=True)
class Site:
    """A site file, read and checked; without one every value is the default."""

    path: Path | None = None  # absolute
    values: Mapping[str, str] = field(default_factory=dict)  # MM_ keys that are set and not empty

    def text(self, key: str) -> str:
        """A value; "" where none is set."""
        return self.values.get(key, "")

    def number(self, key: str, default: int) -> int:
        return int(self.values.get(key, default))

    @property
    def gpus_per_node(self) -> int:
        """0 on a cluster without GPUs."""
        return self.number("MM_GPUS_PER_NODE", 8)

    @property
    def processes_per_node(self) -> int:
        """Ranks of a node: one for each GPU, or as many as the site says where there is none."""
        return self.gpus_per_node or self.number("MM_TASKS_PER_NODE", 1)

    @property
    def hours(self) -> float | None:
        """MM_TIME in hours; None where no limit is set."""
        return slurm_hours(self.text("MM_TIME"))


def read(path: Path | None) -> Site:
    """The site file; else the one that MM_SITE names, else launch/site.env where that exists, else none.

    Raises UserError for a file that bash cannot read, keys that are unknown and values that are none.
    """
    if path is None and not (named := os.environ.get("MM_SITE")) and not DEFAULT.is_file():
        return Site()
    path = path or Path(named or DEFAULT)
    if not path.is_file():
        raise UserError(f"site file not found: {path} (copy launch/site.example.env and edit it)")
    values = _sourced(path.resolve())
    for key in values:
        if key.startswith("MM_") and key not in (*KEYS, *OTHER):
            near = difflib.get_close_matches(key, KEYS, n=1)
            raise UserError(f"{path}: unknown key {key}{f' (did you mean {near[0]}?)' if near else ''}")
    for key, least in NUMBERS.items():
        value = values.get(key, "")
        if value and not (value.isascii() and value.isdecimal() and int(value) >= least):
            raise UserError(f"{path}: {key} is {value!r}; it must be a whole number of at least {least}")
    for key, allowed in CHOICES.items():
        if values.get(key, "") not in ("", *allowed):
            raise UserError(f"{path}: {key} is {values[key]!r}; it must be {' or '.join(allowed)}")
    for key in ("MM_TIME", "MM_CPU_TIME"):
        if values.get(key) and not TIME.fullmatch(values[key]):
            raise UserError(f"{path}: {key} is {values[key]!r}; SLURM takes D-HH:MM:SS, HH:MM:SS or minutes")
    return Site(path.resolve(), {key: value for key, value in values.items() if key in KEYS and value})


def slurm_hours(text: str) -> float | None:
    """Hours of a SLURM time limit: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:minutes[:seconds]].

    None for no limit, and for what is no time.
    """
    if not TIME.fullmatch(text) or not text[0].isdigit():
        return None
    days, dash, rest = text.rpartition("-")
    parts = [int(part) for part in rest.split(":")]
    if dash or len(parts) == 3:
        hours, minutes, seconds = [*parts, 0, 0][:3]
    else:
        hours, (minutes, seconds) = 0, [*parts, 0][:2]
    return int(days or 0) * 24 + hours + minutes / 60 + seconds / 3600


def _sourced(path: Path) -> dict[str, str]:
    """What the file sets, as a bash without anything of the caller's but the essentials sees it."""
    start = {key: os.environ[key] for key in ("PATH", "HOME", "USER", "LANG") if key in os.environ}
    script = 'set -e -a; source "$1" >&2; env -0'
    command = ["bash", "--noprofile", "--norc", "-c", script, "bash", str(path)]
    done = subprocess.run(command, env=start, capture_output=True, timeout=60)
    if done.returncode:
        said = done.stderr.decode(errors="replace").strip().splitlines()
        raise UserError(f"bash cannot read the site file {path}: {said[0] if said else 'a line of it fails'}")
    pairs = (entry.split("=", 1) for entry in done.stdout.decode(errors="replace").split("\0") if "=" in entry)
    return {key: value for key, value in pairs if start.get(key) != value}
