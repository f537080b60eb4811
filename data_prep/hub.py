"""Data sets in the layout of the Hugging Face hub: files of one split at one revision, on the hub or in a folder.

`datasets` says which files a split has; they are then read by data_prep.formats, so that any number of processes can
share them. On the hub, every name holds the commit that the revision stood for.
"""

import fnmatch
import re
from pathlib import Path
from typing import Any

from data_prep.config import SourceConfig
from mm_train.cli import UserError, first_line

SNAPSHOT = re.compile(r"/snapshots/([0-9a-f]{40})(?:/|$)")  # where huggingface_hub keeps what it downloads
REMOTE = re.compile(r"hf://datasets/(?P<id>[^@]+)@(?P<commit>[^/]+)/(?P<name>.+)")


def find_files(source: SourceConfig) -> tuple[list[tuple[str, int]], str]:
    """(files with their sizes, in order; the commit they are from, "" where it is not known).

    Raises UserError for a data set, configuration, split or revision that is not there, and for one without files.
    """
    try:
        import datasets
    except ImportError:
        raise UserError('a source of kind hub needs datasets: pip install "mobilemoe-train[data]"') from None
    path, what = str(source.path), f"data set {source.path}"
    at = f"{what}, revision {source.revision}" if source.revision else what
    local = Path(path).is_dir()
    commit = ""
    if local:
        found = SNAPSHOT.search(Path(path).resolve().as_posix())
        commit = found.group(1) if found else ""
        if commit and source.revision and not commit.startswith(source.revision):
            raise UserError(f"{what} is a snapshot of revision {commit}, not of {source.revision}")
    try:
        builder: Any = datasets.load_dataset_builder(
            path, source.name, revision=None if local else source.revision, data_dir=source.data_dir
        )
    except Exception as error:  # of datasets, huggingface_hub or the network
        raise UserError(f"{at}: {first_line(error)}") from None
    splits = {str(split): files for split, files in (builder.config.data_files or {}).items()}
    if source.split not in splits:
        raise UserError(f"{what} has no split {source.split!r}: it has {', '.join(splits) or 'none'}")
    files = [str(file) for file in splits[source.split]]
    if source.include:
        files = [file for file in files if any(fnmatch.fnmatch(_name(file, path), glob) for glob in source.include)]
    if not files:
        raise UserError(f"{what} has no file like {', '.join(source.include)} in its split {source.split!r}")
    if not local:
        commit = _remote(files[0])["commit"]
    return sorted(_sizes(files).items()), commit


def fetch(file: str) -> str:
    """The local path of a file on the hub, downloaded into huggingface_hub's cache unless it is there."""
    import huggingface_hub

    place = _remote(file)
    return huggingface_hub.hf_hub_download(place["id"], place["name"], repo_type="dataset", revision=place["commit"])


def _remote(file: str) -> dict[str, str]:
    match = REMOTE.fullmatch(file)
    if match is None:
        raise UserError(f"{file} is not a file of the hub at a revision")
    return match.groupdict()


def _name(file: str, path: str) -> str:
    """The name of a file within its data set."""
    return _remote(file)["name"] if "://" in file else Path(file).relative_to(Path(path).resolve()).as_posix()


def _sizes(files: list[str]) -> dict[str, int]:
    if "://" not in files[0]:
        return {file: Path(file).stat().st_size for file in files}
    import fsspec

    file_system, _ = fsspec.core.url_to_fs(files[0])
    listed: dict[str, int] = {}
    for folder in {file.rpartition("/")[0] for file in files}:  # one request a folder, not one a file
        for entry in file_system.ls(folder, detail=True):
            listed[entry["name"]] = entry.get("size") or 0
    return {file: listed[file_system._strip_protocol(file)] for file in files}
