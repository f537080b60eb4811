"""Atomic files: a reader sees the old file or the new one, never half of one. Torch-free."""

import os
from pathlib import Path


def write_atomic(path: Path, data: bytes) -> None:
    """Write `data` to `path` by way of a temporary file in the same folder: written, fsynced, renamed.

    Raises OSError when the folder is missing, read-only or full; the old file is then untouched.
    """
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def publish(temporary: Path, path: Path) -> None:
    """Rename a finished, fsynced file to its final name in the same folder, and make the rename survive a crash."""
    os.replace(temporary, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Make what was written to a file, or the names in a folder, survive a power cut."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def is_file(path: Path) -> bool:
    """Path.is_file, where a name that the system finds impossible is no file rather than an error."""
    try:
        return path.is_file()
    except OSError:
        return False


def is_folder(path: Path) -> bool:
    """Path.is_dir, likewise."""
    try:
        return path.is_dir()
    except OSError:
        return False
