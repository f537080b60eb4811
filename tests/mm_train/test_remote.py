"""Data sets behind URLs: fsspec's own memory file system, and web servers on this machine."""

import http.server
import re
import threading

import fsspec
import numpy as np
import pytest

from mm_train import remote
from mm_train.block_cache import BlockCache
from mm_train.cli import UserError
from mm_train.data import Loader, open_sources
from mm_train.remote import RemoteFolder
from mm_train.shards import ShardReader, ShardWriter
from mm_train.tokenizer import load_tokenizer
from tests.mm_train import shards_format_1
from tests.mm_train.test_data import MIXTURE, same


@pytest.fixture(autouse=True)
def impatient(monkeypatch):
    monkeypatch.setattr(remote, "WAITS", (0.0, 0.0))


@pytest.fixture
def memory(data_set):
    """The shared data set in memory://."""
    files = fsspec.filesystem("memory")
    for file in data_set.rglob("*"):
        if file.is_file():
            files.pipe_file(f"/data/{file.relative_to(data_set)}", file.read_bytes())
    yield "memory://data"
    files.rm("/data", recursive=True)


class Server(http.server.BaseHTTPRequestHandler):
    """A folder with ranges; notes what was asked for."""

    protocol_version = "HTTP/1.1"
    ranges = True

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self.server.folder / self.path.lstrip("/")
        self.server.asked.append((self.path, self.headers.get("Range")))
        if self.server.failures:
            self.server.failures -= 1
            self.send_error(503)
            return
        if not path.is_file():
            self.send_error(404)
            return
        data, status = path.read_bytes(), 200
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if wanted and self.server.ranges:
            data, status = data[int(wanted[1]) : int(wanted[2]) + 1], 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(data_set):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.folder, server.asked, server.failures, server.ranges = data_set, [], 0, True
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    server.url = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.parametrize("kind", ["memory", "server"])
@pytest.mark.parametrize("workers", [0, 3])
def test_batches_are_those_of_the_local_folder(data_set, request, tmp_path, kind, workers):
    place = request.getfixturevalue(kind)
    url = place if kind == "memory" else place.url
    local = Loader(data_set, MIXTURE, 64, seed=0)
    for cache in (None, BlockCache(tmp_path, 1 << 20)):
        loader = Loader(url, MIXTURE, 64, 0, workers, cache=cache)
        assert loader.identity == local.identity
        for first in (0, 32, 512):
            for ours, want in zip(*(each.micro_batches(first, 32, 4, 0, 1) for each in (loader, local)), strict=True):
                assert same(ours, want)
        loader.close()


def test_everything_else_reads_the_same_too(data_set, memory):
    here = open_sources(data_set, ["code", "chat"], "val", 64)
    for name, there in open_sources(memory, ["code", "chat"], "val", 64).items():
        there.verify()
        for ours, want in zip(there.documents(), here[name].documents(), strict=True):
            assert all(np.array_equal(a, b) for a, b in zip(ours, want, strict=True))
    assert load_tokenizer(memory).sha256 == load_tokenizer(data_set).sha256


def test_the_first_format_is_read_from_afar(tmp_path, server):
    shards_format_1.write(tmp_path / "train")
    server.folder = tmp_path
    reader = ShardReader(RemoteFolder(f"{server.url}/train"))
    assert reader.window(2, 7)[0].tolist() == [7, 8] + [999] * 6


def test_only_ranges_are_fetched_and_once(server, tmp_path):
    folder = RemoteFolder(f"{server.url}/code/train", BlockCache(tmp_path, 1 << 20))
    reader = ShardReader(folder)
    server.asked.clear()
    row = reader.row(3, 64)
    assert all(path.endswith(".tar") and wanted for path, wanted in server.asked)
    assert len(server.asked) == 3  # the index, some tokens, some offsets
    asked = len(server.asked)
    again = ShardReader(folder)
    assert np.array_equal(again.row(3, 64).tokens, row.tokens)
    assert len(server.asked) == asked + 1  # the manifest; the rest was kept


def test_what_is_fetched_for_a_row_without_a_cache_is_the_blocks_that_it_lies_in(tmp_path, server, byte_tokenizer):
    server.folder = tmp_path
    facts = {"tokenizer_sha256": byte_tokenizer.sha256, "vocab_size": byte_tokenizer.vocab_size}
    writer = ShardWriter(tmp_path, "a", "train", licence="CC0-1.0", domain="code", **facts)
    tokens = np.arange(200_000) % byte_tokenizer.vocab_size
    for some in np.split(tokens, 400):
        writer.add(some)
    writer.close()
    reader = ShardReader(RemoteFolder(f"{server.url}/a/train"))
    assert reader.row(0, 2048).tokens.tolist() == tokens[:2049].tolist()
    server.asked.clear()
    for window in (40, 41):
        assert reader.row(window, 2048).tokens.tolist() == tokens[window * 2048 :][:2049].tolist()
    ranges = [re.fullmatch(r"bytes=(\d+)-(\d+)", wanted) for _, wanted in server.asked]
    fetched = sum(int(found[2]) - int(found[1]) + 1 for found in ranges)
    assert len(ranges) == 4  # tokens and offsets of each
    assert fetched <= 2 * (2 * reader.manifest.block_bytes + 401 * 8)


def test_a_damaged_piece_in_the_cache_is_fetched_again(server, tmp_path):
    cache = BlockCache(tmp_path, 1 << 20)
    folder = RemoteFolder(f"{server.url}/code/train", cache)
    want = ShardReader(folder).row(3, 64).tokens
    for file in tmp_path.glob("*/*-tokens-*"):
        file.write_bytes(bytes(file.stat().st_size))
    for file in tmp_path.glob("*/*-offsets-*"):
        file.write_bytes(b"short")
    assert np.array_equal(ShardReader(folder).row(3, 64).tokens, want)
    assert np.array_equal(ShardReader(folder).row(3, 64).tokens, want)


def test_a_server_that_stumbles_is_asked_again(server):
    server.failures = 2
    assert ShardReader(RemoteFolder(f"{server.url}/code/train")).row(0, 64)
    server.failures = 3
    with pytest.raises(UserError, match=r"cannot read http://127.0.0.1:\d+/code/train/manifest.json: 503"):
        ShardReader(RemoteFolder(f"{server.url}/code/train"))


def test_what_is_wrong_is_named(server, memory, data_set, tmp_path):
    files = fsspec.filesystem("memory")
    with pytest.raises(UserError, match=r"no shards in http://.*/none/train: manifest\.json is missing"):
        Loader(server.url, {"none": 1}, 64, 0)
    with pytest.raises(UserError, match=r"no shards in memory://data/none/train"):
        Loader(memory, {"none": 1}, 64, 0)
    server.ranges = False
    with pytest.raises(UserError, match=r"gave .* truncated, or its server does not know ranges"):
        Loader(server.url, {"code": 1}, 64, 0).batch(0, 1)
    shard = files.cat_file("/data/code/train/00000.tar")
    files.pipe_file("/data/code/train/00000.tar", shard[:600] + bytes(20_000) + shard[20_600:])
    with pytest.raises(UserError, match=r"corrupt block in shard memory://data/code/train/00000.tar: the tokens"):
        Loader(memory, {"code": 1}, 64, 0).batch(0, 64)
    files.pipe_file("/data/code/train/00000.tar", shard[:-512])
    with pytest.raises(UserError, match=r"truncated shard memory://data/code/train/00000.tar"):
        Loader(memory, {"code": 1}, 64, 0)
    files.rm("/data/code/train/00000.tar")
    with pytest.raises(UserError, match=r"missing shard memory://data/code/train/00000.tar"):
        Loader(memory, {"code": 1}, 64, 0)
    files.rm("/data/tokenizer.json")
    with pytest.raises(UserError, match=r"there is no memory://data/tokenizer\.json"):
        load_tokenizer(memory)
    with pytest.raises(UserError, match="cannot read nothing://x: Protocol not known: nothing"):
        RemoteFolder("nothing://x")


def test_a_secret_of_the_url_is_not_told():
    assert str(RemoteFolder("http://user:secret@host:81/data?token=x")) == "http://host:81/data"
