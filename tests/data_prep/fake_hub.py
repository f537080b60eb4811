"""A small server that speaks what `datasets` and `huggingface_hub` ask of the hub, for the files of one folder."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def serving(folder: Path, name: str) -> Iterator[tuple[str, list[str]]]:
    """(address, requests so far) of a hub with one data set, OWNER/NAME, whose branch main is COMMIT."""
    requests: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            requests.append(f"{self.command} {self.path}")
            path = unquote(urlsplit(self.path).path)
            if match := re.fullmatch(rf"/api/datasets/{name}(?:/revision/([^/]+))?", path):
                self._revision(match[1] or "main") and self._json(_info(folder, name))
            elif match := re.fullmatch(rf"/api/datasets/{name}/tree/([^/]+)/?(.*)", path):
                self._revision(match[1]) and self._json(_tree(folder, match[2], "recursive=true" in self.path.lower()))
            elif match := re.fullmatch(rf"/datasets/{name}/resolve/([^/]+)/(.+)", path):
                self._revision(match[1]) and self._file(folder / match[2])
            else:
                self._error("RepoNotFound", "Repository not found")

        do_HEAD = do_GET

        def do_POST(self) -> None:
            requests.append(f"{self.command} {self.path}")
            asked = self.rfile.read(int(self.headers["Content-Length"])).decode()
            paths = json.loads(asked)["paths"] if asked.startswith("{") else re.findall(r"paths=([^&]+)", asked)
            found = [_entry(folder, folder / unquote(path)) for path in paths if (folder / unquote(path)).exists()]
            self._json(found)

        def _revision(self, revision: str) -> bool:
            if revision in ("main", COMMIT):
                return True
            self._error("RevisionNotFound", f"Invalid rev id: {revision}")
            return False

        def _file(self, file: Path) -> None:
            if not file.is_file():
                self._error("EntryNotFound", "Entry not found")
                return
            data = file.read_bytes()
            first, last = 0, len(data) - 1
            if span := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                first, last = int(span[1]), min(last, int(span[2] or last))
            headers = {
                "ETag": f'"{hashlib.sha256(data).hexdigest()}"',
                "X-Repo-Commit": COMMIT,
                "Accept-Ranges": "bytes",
                "Content-Range": f"bytes {first}-{last}/{len(data)}",
            }
            self._send(206 if span else 200, data[first : last + 1], headers)

        def _json(self, content: Any) -> None:
            self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json", "X-Repo-Commit": COMMIT})

        def _error(self, code: str, message: str) -> None:
            self._send(404, b"{}", {"X-Error-Code": code, "X-Error-Message": message})

        def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()


def _info(folder: Path, name: str) -> dict[str, Any]:
    files = [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()]
    return {
        "_id": "1",
        "id": name,
        "author": name.split("/")[0],
        "sha": COMMIT,
        "private": False,
        "gated": False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "lastModified": "2026-01-01T00:00:00.000Z",
        "createdAt": "2026-01-01T00:00:00.000Z",
        "siblings": [{"rfilename": file} for file in files],
    }


def _tree(folder: Path, path: str, recursive: bool) -> list[dict[str, Any]]:
    found = (folder / path).rglob("*") if recursive else (folder / path).iterdir()
    return [_entry(folder, file) for file in sorted(found)]


def _entry(folder: Path, file: Path) -> dict[str, Any]:
    path = file.relative_to(folder).as_posix()
    if file.is_dir():
        return {"type": "directory", "oid": "0" * 40, "size": 0, "path": path}
    return {
        "type": "file",
        "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
        "size": file.stat().st_size,
        "path": path,
    }
