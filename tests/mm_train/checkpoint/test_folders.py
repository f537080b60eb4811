import os

import pytest

from mm_train.checkpoint import folders
from mm_train.checkpoint.folders import (
    candidates,
    complete,
    find,
    held,
    hold,
    latest,
    let_go,
    prune,
    publish,
    step_of,
)
from mm_train.checkpoint.format import name_of_step, open_checkpoint, read_manifest
from mm_train.cli import UserError


def names(run_dir):
    return [folder.name for folder in candidates(run_dir)[0]]


def make(root, *steps, suffix=""):
    """Folders of checkpoints, as far as names go."""
    for step in steps:
        (root / "checkpoints" / (name_of_step(step) + suffix)).mkdir(parents=True)


def listing(root):
    return sorted(path.name for path in (root / "checkpoints").iterdir())


def test_names_and_steps(tmp_path):
    assert name_of_step(7) == "step-00000007"
    assert name_of_step(123456789) == "step-123456789"
    assert step_of(tmp_path / "step-123456789") == 123456789
    assert [step_of(tmp_path / name) for name in ("step-1", "step-00000001.partial", "step-0000000a", "x")] == [
        None
    ] * 4


def test_steps_are_numbers_not_words(tmp_path):
    make(tmp_path, 99999999, 100000000)
    assert [step_of(folder) for folder in complete(tmp_path)] == [100000000, 99999999]


def test_a_checkpoint_in_use_stays(run):
    root = run / "checkpoints"
    hold(root / "step-00000001")
    prune(run, 3, keep=1, keep_every=0)
    assert names(run) == ["step-00000003", "step-00000001"]
    assert held(run) == [root / "step-00000001"]
    let_go(root / "step-00000001")
    prune(run, 3, keep=1, keep_every=0)
    assert names(run) == ["step-00000003"]
    let_go(root / "step-00000001")  # twice does no harm
    assert held(run) == []


def test_latest_is_the_newest_and_later_ones_do_not_count(run):
    root = run / "checkpoints"
    assert names(run) == ["step-00000003", "step-00000002", "step-00000001"]
    assert latest(run) == find(run) == root / "step-00000003"
    for by_hand in ("step-00000002", "step-00000002\n"):  # back to an earlier one
        (root / "latest").write_text(by_hand)
        assert names(run) == ["step-00000002", "step-00000001"]
        assert candidates(run)[1] is None
    assert latest(run) == root / "step-00000002"


@pytest.mark.parametrize(
    ("content", "trouble"),
    [
        (None, "cannot be read"),
        (b"", "is damaged"),
        (b"\n", "is damaged"),
        (b"garbage \xff\xfe", "cannot be read"),
        (b"step-0000000", "is damaged"),
        (b"step-00000002 abc\n", "is damaged"),
        (b"../../other/checkpoints/step-00000002\n", "is damaged"),
        (b"step-00000009\n", "names step-00000009, which is missing"),
        (b"step-00000002 " + b"0" * 64 + b"\n", "does not fit the manifest of step-00000002"),
    ],
)
def test_without_a_latest_that_can_be_trusted_all_count(run, content, trouble):
    path = run / "checkpoints/latest"
    path.unlink() if content is None else path.write_bytes(content)
    assert len(names(run)) == 3
    assert trouble in candidates(run)[1]


def test_a_flipped_bit_in_latest_is_noticed_or_makes_no_difference(run):
    path = run / "checkpoints/latest"
    content = path.read_bytes()
    for at in range(len(content)):
        for bit in range(8):
            path.write_bytes(content[:at] + bytes([content[at] ^ 1 << bit]) + content[at + 1 :])
            found, trouble = candidates(run)
            assert found[0].name == "step-00000003"
            assert trouble, (at, bit)


def test_the_newest_that_looks_good_is_found(run):
    (run / "checkpoints/step-00000003/rank-00000.safetensors").unlink()
    assert latest(run).name == "step-00000002"
    assert find(run).name == "step-00000002"
    broken = run / "checkpoints/step-00000003"
    assert find(broken) == broken  # asked for by name
    for step in (1, 2):
        (run / "checkpoints" / name_of_step(step) / "manifest.json").unlink()
    assert latest(run) is None
    with pytest.raises(UserError, match=r"step-00000003 is damaged: rank-00000\.safetensors"):
        find(run)


def test_no_checkpoint_is_one_clear_error(tmp_path):
    for folder in (tmp_path, tmp_path / "none", tmp_path / ("x" * 300)):
        with pytest.raises(UserError, match="no checkpoint in"):
            find(folder)
    make(tmp_path, 5, suffix=".partial")
    assert latest(tmp_path) is None
    assert candidates(tmp_path) == ([], None)


def test_the_newest_and_every_so_many_steps_are_kept(tmp_path):
    make(tmp_path, *range(100, 1100, 100))
    prune(tmp_path, 1000, keep=2, keep_every=300)
    assert listing(tmp_path) == [name_of_step(step) for step in (300, 600, 900, 1000)]


def test_the_one_before_a_decay_is_kept(tmp_path):
    make(tmp_path, *range(100, 1100, 100))
    prune(tmp_path, 1000, keep=1, keep_every=0, always=400)
    assert listing(tmp_path) == [name_of_step(step) for step in (400, 1000)]


def test_a_run_that_was_rolled_back_keeps_what_it_saves(tmp_path):
    make(tmp_path, 100, 200, 250, 300, 400)
    prune(tmp_path, 250, keep=2, keep_every=400)  # 400 is a multiple, but of a part of the run that was given up
    assert listing(tmp_path) == [name_of_step(step) for step in (200, 250)]


def test_leftovers_go_and_other_things_stay(tmp_path):
    make(tmp_path, 1, 2)
    make(tmp_path, 2, 7, suffix=".partial")
    make(tmp_path, 2, 3, suffix=".replaced")
    make(tmp_path, 1, suffix=".removed")
    (tmp_path / "checkpoints/step-00000009.partial").mkdir()
    (tmp_path / "checkpoints/step-00000009.partial/rank-00000.safetensors").write_bytes(b"half")
    (tmp_path / "checkpoints/notes").mkdir()
    prune(tmp_path, 2, keep=1, keep_every=0)
    assert listing(tmp_path) == ["notes", "step-00000002"]


def test_one_that_was_moved_aside_counts_while_its_successor_is_missing(run):
    root = run / "checkpoints"
    os.rename(root / "step-00000003", root / "step-00000003.replaced")
    assert latest(run) == root / "step-00000003.replaced"
    assert candidates(run)[1] is None
    assert open_checkpoint(latest(run)).step == 3
    make(run, 3)
    assert latest(run) == root / "step-00000002"  # the new one is empty, hence damaged


@pytest.mark.parametrize("moment", range(1, 12))
def test_a_step_is_never_missing_while_it_is_published_anew(run, moment, monkeypatch):
    """Each operation on the folder fails in turn, and all after it."""
    import shutil

    root = run / "checkpoints"
    partial = root / "step-00000003.partial"
    shutil.copytree(root / "step-00000003", partial)
    digest = read_manifest(partial)["sha256"]
    for step in (1, 2):
        shutil.rmtree(root / name_of_step(step))
    calls = []

    def failing(function):
        def call(*args, **kwargs):
            calls.append(function.__name__)
            if len(calls) >= moment:
                raise OSError("killed")
            return function(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for module, name in ((os, "rename"), (os, "replace"), (shutil, "rmtree"), (folders, "sync"), (os, "fsync")):
            patch.setattr(module, name, failing(getattr(module, name)))
        try:
            publish(partial, digest)
        except OSError:
            assert len(calls) >= moment
        else:
            assert moment > 6
    assert step_of(latest(run)) == 3
    open_checkpoint(latest(run))
