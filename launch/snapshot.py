"""A copy of the project's code for a job: what is edited meanwhile does not change a run that is requeued."""

import os
import shutil
import subprocess
from pathlib import Path

from mm_train.files import writing

PACKAGES = ("mm_train", "kernels", "eval", "launch")  # what training and the benchmarks beside it run


def take(root: Path, folder: Path) -> Path:
    """Copy the packages in `root` to `folder`, unless it is there; returns it. It is whole or absent.

    Files that git ignores are left out, changes that are not committed are taken along; `folder`/COMMIT names the
    commit. Raises UserError where it cannot be written.
    """
    if folder.exists():
        return folder
    partial = folder.with_name(folder.name + ".partial")
    with writing(folder.parent):
        shutil.rmtree(partial, ignore_errors=True)
        for path in files(root):
            target = partial / path
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(root / path, target)
        (partial / "COMMIT").write_text(commit(root) + "\n")
        os.rename(partial, folder)
    return folder


def files(root: Path) -> list[Path]:
    """Source files below `root`, relative to it."""
    listed = _git(root, "ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *PACKAGES)
    if listed is None:  # no git here, or no repository: a copy of the project
        found = [
            path for package in PACKAGES for path in (root / package).rglob("*") if "__pycache__" not in path.parts
        ]
        return [path.relative_to(root) for path in found if path.is_file()]
    return [Path(name) for name in listed.split("\0") if name and (root / name).is_file()]


def commit(root: Path) -> str:
    """The commit in `root`, with a mark when files differ from it."""
    head = _git(root, "rev-parse", "HEAD")
    changed = _git(root, "status", "--porcelain")
    return "unknown" if head is None else head.strip() + (" and changes" if changed else "")


def _git(root: Path, *words: str) -> str | None:
    try:
        return subprocess.run(
            ["git", "-C", root, *words], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
