"""Atomic files: a reader sees the old file or the new one, never half of one. Torch-free."""

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from mm_train.cli import UserError


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


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """What cannot be written into `folder`, as one clear UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write the run folder {folder}: {error.strerror or error}") from None


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Make the folder if need be, and keep it to this process.

    Raises UserError when another process has it, or it cannot be written. A file system without locks has none.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / "lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        with contextlib.suppress(OSError):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another process is training in {folder}: give this one another run.dir. (Several that all say so"
                    " were started without RANK and WORLD_SIZE: each takes itself for the only one.)"
                ) from None
        yield
    finally:
        os.close(descriptor)  # releases the lock, as the end of the process would


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
