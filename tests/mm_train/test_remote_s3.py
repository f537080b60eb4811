"""Training data in S3, from a server of its own kind on this machine: pip install s3fs "moto[server,s3]"."""

import pytest

from data_prep import peek
from mm_train.block_cache import BlockCache
from mm_train.data import Loader
from tests.mm_train.test_data import MIXTURE, same

pytestmark = pytest.mark.slow


@pytest.fixture
def bucket(data_set, monkeypatch):
    s3fs = pytest.importorskip("s3fs", reason="s3fs is not installed")
    server = pytest.importorskip("moto.server", reason="moto[server] is not installed").ThreadedMotoServer(port=0)
    server.start()
    host, port = server.get_host_and_port()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{host.replace('0.0.0.0', '127.0.0.1')}:{port}")
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    s3fs.S3FileSystem.clear_instance_cache()
    files = s3fs.S3FileSystem()
    files.mkdir("shards")
    files.put(f"{data_set}/", "shards/data/", recursive=True)
    yield "s3://shards/data"
    server.stop()
    s3fs.S3FileSystem.clear_instance_cache()


def test_batches_and_windows_are_those_of_the_local_folder(data_set, bucket, tmp_path, capsys):
    local = Loader(data_set, MIXTURE, 64, seed=0)
    for workers, cache in ((0, None), (2, None), (2, BlockCache(tmp_path, 1 << 20))):
        loader = Loader(bucket, MIXTURE, 64, 0, workers, cache=cache)
        assert loader.identity == local.identity
        for first in (0, 512):
            for ours, want in zip(*(each.micro_batches(first, 32, 4, 0, 1) for each in (loader, local)), strict=True):
                assert same(ours, want)
        loader.close()
    shown = []
    for place in (str(data_set), bucket):
        assert peek.main([f"{place}/code/train", "--window", "1", "--verify"]) == 0
        shown.append(capsys.readouterr().out.splitlines()[1:])
    assert shown[0] == shown[1]
    assert peek.main([f"{bucket}/nowhere/train"]) == 2
    assert "error: " in capsys.readouterr().err
