"""The training loop and the copy beside it."""

import threading

from mm_train.checkpoint.folders import complete
from mm_train.checkpoint.format import open_checkpoint
from mm_train.checkpoint.share import Staging
from mm_train.checkpoint.writer import Writer
from mm_train.run_folder import read_stage
from mm_train.train import train


def test_training_waits_for_the_copy_before_it_changes_anything(small_config, tmp_path, monkeypatch):
    """Every copy begins as late as it may, when training asks for its tensors: yet it is what was there at the save."""
    small_config.checkpoint.keep = 9
    digests = {}
    go = threading.Event()
    copy, save, settle, wait = Staging.copy, Writer.save, Writer.settle, Writer.wait

    def late_copy(self, tensors):
        assert go.wait(60)
        return copy(self, tensors)

    def late_save(self, *args):
        go.clear()
        return save(self, *args)

    def long_settle(self):
        extra = 0 if go.is_set() else 100
        go.set()
        return settle(self) + extra

    def late_wait(self):
        go.set()
        wait(self)

    for asynchronous in (False, True):
        small_config.run.dir = str(tmp_path / str(asynchronous))
        small_config.checkpoint.asynchronous = asynchronous
        with monkeypatch.context() as patch:
            if asynchronous:
                patch.setattr(Staging, "copy", late_copy)
                for name, method in (("save", late_save), ("settle", long_settle), ("wait", late_wait)):
                    patch.setattr(Writer, name, method)
            assert train(small_config) == 0
        folders = complete(tmp_path / str(asynchronous))
        digests[asynchronous] = {folder.name: open_checkpoint(folder).records[0].sha256 for folder in folders}
    assert len(set(digests[True].values())) == 3
    assert digests[True] == digests[False]
    stalled = {record["step"]: record["stalled_seconds"] for record in read_stage(tmp_path / "True").checkpoints}
    assert {step: int(seconds // 100) for step, seconds in stalled.items()} == {4: 1, 8: 1, 12: 0}
