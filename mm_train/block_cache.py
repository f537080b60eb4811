"""Pieces of remote files kept on the local disk, up to a number of bytes. Torch-free.

Every piece is a file of its own, written whole or not at all, so the processes of a machine can share a folder. When
there is too much, what was not used for longest goes. Nothing that fails here stops anybody: a disk that is full, or a
piece that another process has just removed, means to fetch again.
"""

import contextlib
import os
import threading
from pathlib import Path

LOOK_AGAIN = 16  # the folder is measured whenever this process has added a 16th of what may be in it
KEEP = 0.9  # of what may be in it, when something has to go


class BlockCache:
    """At most about `max_bytes` in `folder`; processes that share it may each go over by a LOOK_AGAINth."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder, self.max_bytes = folder.expanduser(), max_bytes
        self._added = max_bytes  # since the folder was last measured: the first piece measures it
        self._lock = threading.Lock()

    def get(self, key: str) -> bytes | None:
        """What was put under `key`, or nothing. Nobody checks it."""
        path = self._path(key)
        try:
            data = path.read_bytes()
            os.utime(path)  # used now
        except OSError:
            return None
        return data

    def put(self, key: str, data: bytes) -> None:
        """Keep `data` under `key`, a name without slashes."""
        path = self._path(key)
        temporary = path.with_name(f"{path.name}.{os.getpid()}-{threading.get_ident()}.tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_bytes(data)
            os.replace(temporary, path)
        except OSError:
            with contextlib.suppress(OSError):
                temporary.unlink()
            return
        with self._lock:
            self._added += len(data)
            if self._added * LOOK_AGAIN > self.max_bytes:
                self._added = 0
                self._make_room()

    def remove(self, key: str) -> None:
        """Forget a piece that turned out damaged."""
        with contextlib.suppress(OSError):
            self._path(key).unlink()

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / key

    def _make_room(self) -> None:
        found = []
        for file in self.folder.glob("*/*"):
            with contextlib.suppress(OSError):
                facts = file.stat()
                found.append((facts.st_mtime_ns, facts.st_size, file))
        total = sum(size for _, size, _ in found)
        if total <= self.max_bytes:
            return
        for _, size, file in sorted(found, key=lambda item: item[0]):
            with contextlib.suppress(OSError):
                file.unlink()
            total -= size
            if total <= KEEP * self.max_bytes:
                return
