"""What cannot be read now, and may be good: nobody falls back to an older checkpoint for it, on any rank."""

import errno
import os
import shutil
from pathlib import Path

import pytest

from mm_train.checkpoint.__main__ import main
from mm_train.checkpoint.files import VectorFile
from mm_train.checkpoint.folders import find, latest, prune
from mm_train.checkpoint.format import Damaged, unreadable
from mm_train.checkpoint.reader import Reader, open_newest
from mm_train.checkpoint.writer import Writer
from mm_train.cli import UserError
from mm_train.model_folder import weight_source
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import engines, random_state, together, world

FILE = "rank-00002.safetensors"
WAYS = {  # what fails -> (method of Path, or function of os; name of the file)
    "length of the manifest": ("stat", "manifest.json"),
    "manifest": ("read_bytes", "manifest.json"),
    "length of a file": ("stat", FILE),
    "file": ("open", FILE),  # by the one rank that hashes it
    "kind of the folder": ("stat", "step-00000020"),
    "latest": ("read_text", "latest"),
    "list of the folders": ("listdir", "checkpoints"),
}


@pytest.fixture
def sharded(synchronous, tmp_path, facts):
    """A run of four ranks with checkpoints of steps 10 and 20."""
    groups = world(ep=2, tp=2)
    ranks = engines(synchronous.model, random_state(synchronous.model), groups)
    for step in (10, 20):
        writers = [Writer(tmp_path, member, synchronous) for member in groups]
        together(groups, lambda rank, w=writers, s=step: w[rank].save(s, ranks[rank], facts))
    return tmp_path


def fail(patch, way, number):
    """Let reading fail, of the newest checkpoint's files."""
    method, name = WAYS[way]
    owner = os if method == "listdir" else Path
    real = getattr(owner, method)

    def failing(path, *args, **kwargs):
        if Path(path).name == name and "step-00000010" not in str(path):
            raise OSError(number, os.strerror(number))
        return real(path, *args, **kwargs)

    patch.setattr(owner, method, failing)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("way", WAYS)
def test_no_rank_falls_back(sharded, monkeypatch, way, number):
    said, groups = [], world(3)
    with monkeypatch.context() as patch:
        fail(patch, way, number)
        results = together(groups, lambda rank: open_newest(sharded, groups[rank], said.append))
        prune(sharded, 20, keep=2, keep_every=0)
    for result in results:
        assert isinstance(result, UserError)
        assert not isinstance(result, Damaged)
        assert str(result).startswith(f"cannot read {sharded}")
        assert str(result).endswith(f": {os.strerror(number)}; nothing was changed")
    assert len({str(result) for result in results}) == 1
    assert said == []
    assert open_newest(sharded, Groups(), said.append).step == 20


@pytest.mark.parametrize("way", [way for way in WAYS if way != "file"])
def test_no_older_one_is_meant_by_a_run(sharded, monkeypatch, way):
    with monkeypatch.context() as patch:
        fail(patch, way, errno.EIO)
        with pytest.raises(UserError, match=r"^cannot read .*: Input/output error; nothing was changed"):
            find(sharded)
        latest(sharded)  # for what is said of a run: never an error
    assert find(sharded).name == "step-00000020"


def test_contents_that_cannot_be_read_are_not_damage(sharded, monkeypatch, capsys):
    reader = Reader(latest(sharded))

    def failing(*args):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pread", failing)
        patch.setattr(os, "preadv", failing)
        for read in (lambda: reader.read("model.norm.weight"), reader.rng_state):
            with pytest.raises(UserError, match="cannot read") as caught:
                read()
            assert not isinstance(caught.value, Damaged)
    with monkeypatch.context() as patch:
        fail(patch, "file", errno.EIO)
        for use in (Reader(latest(sharded)).verify, lambda: weight_source(sharded)):
            with pytest.raises(UserError, match=rf"^cannot read .*step-00000020/{FILE}: Input/output error"):
                use()
        assert main(["verify", str(sharded)]) == 1
        lines = capsys.readouterr().out.splitlines()
        assert [line.split()[0] for line in lines] == ["refused", "ok"]
    assert VectorFile(latest(sharded) / FILE).vectors()


def test_only_what_is_missing_is_damage(tmp_path):
    for number in (errno.ENOENT, errno.ENOTDIR, errno.EISDIR):
        error = unreadable(tmp_path, FILE, OSError(number, os.strerror(number)))
        assert isinstance(error, Damaged)
        assert f"is damaged: {FILE}: {os.strerror(number)}" in str(error)
    assert not isinstance(unreadable(tmp_path, FILE, OSError(errno.EIO, "broken")), Damaged)


def test_a_run_of_which_nothing_is_there_starts_anew(tmp_path, sharded):
    shutil.rmtree(sharded / "checkpoints")
    assert open_newest(sharded, Groups(), print) is None
