"""A folder of results that appears whole or not at all, and replaces only what this project wrote there before."""

import contextlib
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mm_train.cli import UserError
from mm_train.files import publish

SUMS = "SHA256SUMS"


@contextlib.contextmanager
def output_folder(path: Path, foreign: Callable[[Path], Path | None], what: str) -> Iterator[Path]:
    """Yield a new, empty folder to fill; when the block ends well, it takes the place of `path`.

    `foreign(path)` is the first thing there that may not be replaced. Raises UserError for such a thing, and where
    `what` cannot be written; what was at `path` is then as it was.
    """
    path = path.resolve()
    # What is made here lies in a folder of a name of its own, so that nothing of anybody else's can be in the way.
    scratch = path.with_name(f".{path.name}.mobilemoe-partial")
    new, old = scratch / "new", scratch / "old"
    if old.is_dir() and not path.exists():  # killed between the two renames below
        os.replace(old, path)
    stranger = foreign(path)
    if stranger is not None:
        raise UserError(f"{stranger} exists and was not written by this project: choose another place, or remove it")
    try:
        shutil.rmtree(scratch, ignore_errors=True)
        new.mkdir(parents=True)
        yield new
        if path.exists():
            os.replace(path, old)
        try:
            publish(new, path)
        except OSError:
            if old.exists():
                os.replace(old, path)
            raise
    except OSError as error:
        raise UserError(f"cannot write {what} to {path}: {error.strerror or error}") from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def foreign_to(own: set[str]) -> Callable[[Path], Path | None]:
    """`foreign` for folders that hold files of these names alone."""

    def first(path: Path) -> Path | None:
        if not path.is_dir():
            return path if path.exists() else None
        unknown = sorted(entry.name for entry in path.iterdir() if entry.name not in own)
        return path / unknown[0] if unknown else None

    return first


def write_sums(folder: Path) -> None:
    """SHA256SUMS of every file in a folder, as sha256sum -c reads it."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and file.name != SUMS)
    lines = [f"{sha256(file)}  {file.relative_to(folder).as_posix()}\n" for file in files]
    (folder / SUMS).write_text("".join(lines))


def sha256(file: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
