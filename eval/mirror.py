"""The benchmarks' data on disk. `datasets.load_dataset` is served from it, so that evaluation needs no network.

Layout: mirror.json (what there is: items, size, sha256) and PATH/NAME/SPLIT.arrow (Arrow stream files), where PATH and
NAME are those of the data set on the hub ("default" where it has no named configuration). eval.prepare_data writes it.
"""

import contextlib
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from eval.suite import Benchmark, DatasetRef
from mm_train.cli import UserError
from mm_train.files import write_atomic

INDEX = "mirror.json"
FORMAT = 2  # raise it when the meaning of the files changes: prepare_data then builds them anew


class MissingDataError(Exception):
    """The mirror lacks something that a benchmark reads; the message names it."""


class Mirror:
    """A mirror folder, opened for reading. A folder without mirror.json is an empty mirror.

    Raises UserError when mirror.json cannot be read.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.sha256 = ""  # of the list of files with their hashes
        self.source = ""
        self.files: dict[str, dict[str, Any]] = {}  # "PATH/NAME/SPLIT" -> items, bytes, sha256, source, note
        index = folder / INDEX
        if index.is_file():
            try:
                content = json.loads(index.read_bytes())
                if content["format"] == FORMAT:
                    self.source, self.files = content["source"], content["files"]
                    self.sha256 = hashlib.sha256(json.dumps(self.files, sort_keys=True).encode()).hexdigest()
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{index} is damaged: delete it and run python -m eval.prepare_data again") from None

    def count(self, dataset: DatasetRef) -> int:
        """Number of items of a split; 0 when it is not there."""
        prefix = f"{dataset.path}/{dataset.name}/" if dataset.name else f"{dataset.path}/"
        return sum(
            entry["items"]
            for key, entry in self.files.items()
            if key.startswith(prefix) and key.endswith(f"/{dataset.split}")
        )

    def entries(self, benchmark: Benchmark) -> dict[str, dict[str, Any]]:
        """What a benchmark reads: the files of its data set and configuration."""
        ref = benchmark.dataset
        prefix = f"{ref.path}/{ref.name}/" if ref.name else f"{ref.path}/"
        splits = {ref.split, benchmark.examples}
        return {k: e for k, e in self.files.items() if k.startswith(prefix) and k.rpartition("/")[2] in splits}

    def notes(self, benchmark: Benchmark) -> list[str]:
        """In what a benchmark's data differs from the hub's, by split."""
        noted = [(key.rpartition("/")[2], entry["note"]) for key, entry in self.entries(benchmark).items()]
        return list(dict.fromkeys(f"{split}: {note}" for split, note in noted if note))

    def data_hash(self, benchmark: Benchmark) -> str:
        """Hash of all that a benchmark reads."""
        hashes = {key: entry["sha256"] for key, entry in self.entries(benchmark).items()}
        return hashlib.sha256(json.dumps(hashes, sort_keys=True).encode()).hexdigest()

    def load_dataset(self, path: str, name: str | None = None, split: str | None = None, **_: Any) -> Any:
        """What `datasets.load_dataset` would give: the splits by name, or one split.

        Raises MissingDataError for what the mirror does not hold, UserError for a damaged file.
        """
        splits = _Splits(path, name)
        prefix = f"{path}/{name or 'default'}/"
        for key in self.files:
            if key.startswith(prefix):
                splits[key.removeprefix(prefix)] = self._read(key)
        if not splits:
            raise MissingDataError(f"no data set {path} {name or ''}".rstrip())
        return splits if split is None else splits[split]

    def _read(self, key: str) -> Any:
        import datasets
        import pyarrow

        file, entry = self.folder / f"{key}.arrow", self.files[key]
        data = file.read_bytes() if file.is_file() else b""
        if hashlib.sha256(data).hexdigest() != entry["sha256"]:
            raise UserError(
                f"{file}: {len(data)} bytes differ from the {entry['bytes']} that {INDEX} lists: "
                f"delete {self.folder / INDEX} and run python -m eval.prepare_data again"
            )
        # In memory, not memory-mapped: `map` would otherwise write its cache files into the mirror.
        return datasets.Dataset.from_buffer(pyarrow.py_buffer(data))

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """While open, every `datasets.load_dataset(...)` of this process is answered from the mirror."""
        import datasets

        original = datasets.load_dataset
        datasets.load_dataset = self.load_dataset
        try:
            yield
        finally:
            datasets.load_dataset = original


class _Splits(dict):
    """Splits by name. An absent train split is empty; any other absent split is an error.

    lm-eval looks at the train split when it builds a task, also for 0 shots. Few-shot prompts then fail for want of
    examples. Were the split hidden from lm-eval instead, it would draw them from the very items it evaluates.
    """

    def __init__(self, path: str, name: str | None) -> None:
        super().__init__()
        self.origin = f"{path} {name or ''}".rstrip()

    def __missing__(self, split: str) -> Any:
        if split == "train" and self:
            return next(iter(self.values())).select([])
        raise MissingDataError(f"data set {self.origin} has no split {split!r}")


def write_index(folder: Path, source: str, files: dict[str, dict[str, Any]]) -> None:
    """Write mirror.json. It goes last: a mirror without it is not there."""
    content = {"format": FORMAT, "source": source, "files": files}
    write_atomic(folder / INDEX, (json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def write_split(folder: Path, dataset: DatasetRef, table: Any) -> tuple[str, dict[str, Any]]:
    """Write one split (a pyarrow Table) and return its key and entry for mirror.json."""
    import pyarrow

    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data = sink.getvalue().to_pybytes()
    key = f"{dataset.path}/{dataset.name}/{dataset.split}"
    file = folder / f"{key}.arrow"
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, data)
    return key, {"items": table.num_rows, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
