"""Benchmarks' splits from the Hugging Face hub, at a recorded revision."""

import socket
from collections.abc import Iterator
from typing import Any, NamedTuple
from urllib.parse import urlsplit

from eval.suite import Benchmark, DatasetRef
from mm_train.cli import first_line

CONNECT_SECONDS = 5.0


class Fetched(NamedTuple):
    """A split, or why it cannot be had."""

    dataset: DatasetRef
    table: Any  # pyarrow.Table | None
    revision: str
    error: str = ""


def reachable() -> bool:
    """Whether the hub (HF_ENDPOINT, if that is set) takes a connection."""
    from huggingface_hub import constants

    address = urlsplit(constants.ENDPOINT)
    port = address.port or (443 if address.scheme == "https" else 80)
    try:
        with socket.create_connection((address.hostname or "", port), timeout=CONNECT_SECONDS):
            return True
    except OSError:
        return False


def fetch(benchmark: Benchmark) -> Iterator[Fetched]:
    """Every split that a benchmark reads. What fails is told, and the rest goes on."""
    import datasets
    import huggingface_hub

    ref = benchmark.dataset
    splits = [ref.split, *([benchmark.examples] if benchmark.examples else [])]
    try:
        revision = huggingface_hub.HfApi().dataset_info(ref.path).sha or "main"
        names = [ref.name] if ref.name else datasets.get_dataset_config_names(ref.path, revision=revision)
    except Exception as error:  # whatever the network, the hub or a gate says
        yield Fetched(ref, None, "", first_line(error))
        return
    for name in names:
        for split in splits:
            wanted = DatasetRef(ref.path, split, name)
            try:
                config = None if name == "default" else name
                rows = datasets.load_dataset(ref.path, config, split=split, revision=revision)
                yield Fetched(wanted, rows.with_format("arrow")[:], revision)
            except Exception as error:
                yield Fetched(wanted, None, revision, first_line(error))
