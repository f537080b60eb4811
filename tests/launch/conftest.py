"""One SLURM for all tests of a file."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.launch.cluster import Cluster, missing


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    """A cluster of three nodes; skipped with the reason where none can be started."""
    reason = missing()
    if reason:
        pytest.skip(reason)
    folder = Path(tempfile.mkdtemp(prefix="mm-slurm-"))  # pytest's own would be too long for a socket
    try:
        with Cluster(folder) as started:
            yield started
    finally:
        shutil.rmtree(folder, ignore_errors=True)
