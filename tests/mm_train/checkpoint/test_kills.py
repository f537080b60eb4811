"""A process that saves is killed before each of its changes of files in turn: the newest checkpoint stays usable.

No stand-ins: a forked child leaves by os._exit from an audit hook, so that nothing of it runs any more.
"""

import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from mm_train import config
from mm_train.checkpoint.folders import complete
from mm_train.checkpoint.reader import open_newest
from mm_train.checkpoint.writer import Writer
from mm_train.inventory import KINDS
from tests.mm_train.checkpoint.layouts import FACTS, LEAST, engines, random_state, world

CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir")
KILLED, FINISHED, FAILED = 9, 0, 3


def save_and_die(folder: Path, moment: int, save) -> int:
    """Run `save` in a child that dies before its change number `moment` in `folder`; its exit status."""
    if child := os.fork():
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    count = 0

    def hook(event, args):
        nonlocal count
        writes = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR) and str(args[0]).startswith(str(folder))
        if writes or event in CHANGES:  # rmtree names what it removes relative to its folder
            count += 1
            if count == moment:
                os._exit(KILLED)

    try:
        sys.addaudithook(hook)
        save()
    except BaseException:
        os._exit(FAILED)
    os._exit(FINISHED)


class Run:
    """A run of one rank whose weights say the step at which they were saved, and how often."""

    def __init__(self, folder: Path, keep: int, asynchronous: bool) -> None:
        self.folder = folder
        self.cfg = config.Config(model=LEAST, checkpoint=config.Checkpoint(keep=keep, asynchronous=asynchronous))

    def save(self, step: int, value: float) -> None:
        (groups,) = world()
        state = {
            kind: {name: torch.full_like(t, value) for name, t in random_state(LEAST)[kind].items()} for kind in KINDS
        }
        writer = Writer(self.folder, groups, self.cfg)
        writer.save(step, engines(LEAST, state, [groups])[0], FACTS)
        writer.wait()

    def newest(self) -> tuple[int, float] | None:
        """(step, value) of the checkpoint that the run would go on from; every byte of it is in order."""
        (groups,) = world()
        reader = open_newest(self.folder, groups, lambda text: None)
        if reader is None:
            return None
        (value,) = {float(value) for name in reader.names() for value in reader.read(name).unique()}
        return reader.step, value


SITUATIONS = {  # (steps saved before with keep, what is done to them, step saved now; what it went on from)
    "first": ((), "", 1, None),
    "next": ((2, 3), "", 4, (3, 3.0)),
    "only one, again": ((3,), "", 3, (3, 3.0)),
    "back by hand": ((1, 2, 3), "latest", 2, (1, 1.0)),
    "the newest is damaged": ((2, 3), "damage", 3, (2, 2.0)),
}


@pytest.mark.parametrize(
    ("situation", "asynchronous"), [*((name, False) for name in SITUATIONS), ("next", True), ("only one, again", True)]
)
def test_a_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path, situation, asynchronous):
    steps, spoil, step, before = SITUATIONS[situation]
    after, template = (step, 99.0), tmp_path / "template"
    for earlier in steps:
        Run(template, 3, False).save(earlier, earlier)
    root = template / "checkpoints"
    if spoil == "latest":
        (root / "latest").write_text("step-00000001\n")
    elif spoil == "damage":
        (root / "step-00000003/rank-00000.safetensors").write_bytes(b"")
    run = Run(tmp_path / "run", 1 if len(steps) == 1 else 2, asynchronous)
    outcomes = []
    for moment in range(1, 1000):
        shutil.rmtree(run.folder, ignore_errors=True)
        if steps:
            shutil.copytree(template, run.folder)
        status = save_and_die(run.folder, moment, lambda: run.save(*after))
        assert status in (KILLED, FINISHED)
        outcomes.append(run.newest())
        assert outcomes[-1] in (before, after), moment
        if moment % 3 and status == KILLED:
            continue
        run.save(*after)  # the next process saves as if nothing had been, and sweeps up
        assert run.newest() == after
        names = {path.name for path in (run.folder / "checkpoints").iterdir()}
        assert names == {"latest", *(folder.name for folder in complete(run.folder))}
        if status == FINISHED:
            break
    assert moment > 8
    there = outcomes.index(after)
    assert there > 0
    assert set(outcomes[there:]) == {after}  # once it is published, it stays
