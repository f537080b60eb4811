import os
import subprocess
import sys

import pytest

from mm_train.cli import UserError
from mm_train.files import locked, write_atomic


def test_replaces_and_leaves_nothing_else(tmp_path):
    file = tmp_path / "a.json"
    write_atomic(file, b"old")
    write_atomic(file, b"new")
    assert file.read_bytes() == b"new"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    file = tmp_path / "a.json"
    write_atomic(file, b"old")

    def disk_full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", disk_full)
    with pytest.raises(OSError, match="No space left"):
        write_atomic(file, b"new")
    assert file.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.json"]


def test_a_missing_folder_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        write_atomic(tmp_path / "none" / "a.json", b"x")


def test_a_folder_is_kept_to_one_process_until_it_ends(tmp_path):
    code = "import sys; from pathlib import Path; from mm_train.files import locked\n"
    code += "with locked(Path(sys.argv[1])): print('has it', flush=True); sys.stdin.read()"
    other = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert other.stdout.readline() == "has it\n"
    with pytest.raises(UserError, match=r"another process is training in .*run: give this one another run.dir"):
        locked(tmp_path / "run").__enter__()
    other.kill()
    other.communicate()
    for _ in range(2):
        with locked(tmp_path / "run"):
            pass


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write the run folder .*file/run: Not a directory"):
        locked(tmp_path / "file" / "run").__enter__()
