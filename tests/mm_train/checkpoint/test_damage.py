"""Every file of a run's newest checkpoint spoilt in every way: it is always noticed, and the one before is used."""

import random
import re
import shutil

import pytest
import torch

from mm_train.checkpoint.reader import Reader, open_newest
from mm_train.cli import UserError
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import ThreadGroups, engines, random_state, together, world


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1 << at % 8]) + content[at + 1 :]


def spoilt(content):
    """Name of a damage -> the file's new content; None: it is gone."""
    length, chance = len(content), random.Random(0)
    ways = {"removed": None, "emptied": b"", "garbage": chance.randbytes(length), "short garbage": b"\0\1\2"}
    ways |= {f"cut at {at}": content[:at] for at in (1, length // 2, length - 1)}
    ways |= {"one byte more": content + b"\0"}
    places = [0, 7, 8, 9, length // 3, length - 1, *(chance.randrange(length) for _ in range(3))]
    return ways | {f"bit flipped at {at}": flipped(content, at) for at in places}


@pytest.fixture
def sharded(synchronous, tmp_path, facts):
    """A run of four ranks with checkpoints of steps 10 and 20, which differ; and the state of each."""
    from mm_train.checkpoint.writer import Writer

    synchronous.checkpoint.keep = 3
    groups, states = world(ep=2, tp=2), {}
    for step in (10, 20):
        states[step] = random_state(synchronous.model, seed=step)
        ranks = engines(synchronous.model, states[step], groups)
        writers = [Writer(tmp_path, member, synchronous) for member in groups]
        together(groups, lambda rank, w=writers, e=ranks, s=step: w[rank].save(s, e[rank], facts))
    return tmp_path, states


def test_every_damage_to_every_file_is_noticed(sharded):
    run, states = sharded
    newest = run / "checkpoints/step-00000020"
    name = "model.layers.1.feed_forward.experts.gate_up_proj"
    assert sorted(path.name for path in newest.iterdir())[0] == "manifest.json"
    for path in sorted(newest.iterdir()):
        content = path.read_bytes()
        for how, other in spoilt(content).items():
            path.unlink()
            if other is not None:
                path.write_bytes(other)
            said = []
            reader = open_newest(run, Groups(), said.append)
            assert reader.step == 10, (path.name, how)
            assert len(said) == 1
            what = rf"checkpoint step-00000020 is damaged: {re.escape(path.name)}: .+; trying step-00000010"
            assert re.fullmatch(what, said[0]), said
            assert torch.equal(reader.read(name), states[10]["weight"][name])
            path.write_bytes(content)
    assert open_newest(run, Groups(), said.append).step == 20


def test_every_damage_to_latest_still_gives_the_newest(sharded):
    run, _ = sharded
    path = run / "checkpoints/latest"
    content = path.read_bytes()
    for how, other in spoilt(content).items():
        path.unlink()
        if other is not None:
            path.write_bytes(other)
        said = []
        assert open_newest(run, Groups(), said.append).step == 20, how
        assert len(said) == 1
        assert "looking at all checkpoints" in said[0]
        path.write_bytes(content)
    path.write_bytes(content[:13])  # as a hand would have written it
    assert open_newest(run, Groups(), said.append).step == 20


def test_without_a_good_one_all_are_named_and_nothing_starts_anew(sharded):
    run, _ = sharded
    (run / "checkpoints/step-00000010/rank-00003.safetensors").unlink()
    (run / "checkpoints/step-00000020/manifest.json").write_bytes(b"")
    groups = [ThreadGroups()]
    (result,) = together(groups, lambda rank: open_newest(run, groups[rank], print))
    assert isinstance(result, UserError)
    assert re.search(
        r"no checkpoint in .* can be used: checkpoint step-00000020 is damaged: manifest\.json: it is not JSON;"
        r" checkpoint step-00000010 is damaged: rank-00003\.safetensors: No such file or directory; mend or remove",
        str(result),
    )


def test_two_damaged_ones_are_passed_over_one_by_one(run):
    for step in (3, 2):
        shutil.rmtree(run / f"checkpoints/step-{step:08d}")
        (run / f"checkpoints/step-{step:08d}").mkdir()
    said = []
    assert open_newest(run, Groups(), said.append).step == 1
    assert [text.split()[-1] for text in said] == ["step-00000002", "step-00000001"]


def test_damage_while_it_is_read_is_named(run):
    reader = Reader(run / "checkpoints/step-00000003").verify()
    path = run / "checkpoints/step-00000003/rank-00000.safetensors"
    path.write_bytes(b"\0" * path.stat().st_size)
    with pytest.raises(UserError, match=r"step-00000003 is damaged: rank-00000\.safetensors: its header"):
        reader.read("model.norm.weight")
    with pytest.raises(UserError, match=r"step-00000003 is damaged: rank-00000\.safetensors: its header"):
        reader.rng_state()
    with pytest.raises(UserError, match=r"is damaged: rank-00000\.safetensors: its sha256 is not the one"):
        Reader(run / "checkpoints/step-00000003").verify()
