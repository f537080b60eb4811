"""Writing: what arrives on the disk, and what becomes of everything that can go wrong. Kills: test_kills."""

import errno
import os
import random
import resource
import shutil
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from mm_train.checkpoint import files, writer
from mm_train.checkpoint.folders import latest
from mm_train.checkpoint.reader import Reader
from mm_train.checkpoint.share import Staging
from mm_train.checkpoint.writer import Writer
from mm_train.cli import UserError
from mm_train.parallel.groups import Groups
from tests.mm_train.checkpoint.layouts import engines, random_state, together, world

FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def listing(run_dir):
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.fixture
def slow(monkeypatch):
    """Writes wait until this is set."""
    go = threading.Event()
    write = files.write

    def waiting(*args):
        assert go.wait(60)
        return write(*args)

    monkeypatch.setattr(files, "write", waiting)
    return go


def test_what_is_saved_asynchronously_is_what_was_there_at_the_call(engine, small_config, tmp_path, facts, slow):
    want = {name: tensor.clone() for name, tensor in engine.model.state_dict().items()}
    moments = {name: engine.adam.state[p]["exp_avg_sq"].clone() for name, p in engine.parameters.items()}
    saver = Writer(tmp_path, Groups(), small_config)
    saver.reserve(engine)
    stalled = saver.save(4, engine, facts)
    assert saver.poll() == []
    assert latest(tmp_path) is None
    saver.settle()
    with torch.no_grad():  # training goes on
        for tensor in engine.model.state_dict().values():
            tensor.fill_(7)
        for state in engine.adam.state.values():
            state["exp_avg_sq"].fill_(7)
    slow.set()
    saver.wait()
    (written,) = saver.poll()
    assert saver.poll() == []
    assert (written.step, written.folder) == (4, latest(tmp_path))
    assert written.seconds >= stalled > 0
    assert written.bytes == sum(file.stat().st_size for file in written.folder.glob("rank-*"))
    assert sorted(file.name for file in written.folder.iterdir()) == ["manifest.json", "rank-00000.safetensors"]
    reader = Reader(written.folder).verify()
    assert all(torch.equal(reader.read(name), tensor) for name, tensor in want.items())
    assert all(torch.equal(reader.read(name, "exp_avg_sq"), moment) for name, moment in moments.items())


def test_training_goes_on_from_what_is_saved(engine, small_config, tmp_path, facts, slow):
    """Saved between two steps, with the second one's gradients computed before `settle`."""
    saver = Writer(tmp_path, Groups(), small_config)
    model = engine.model

    def compute():
        engine.backward(model(torch.randint(0, 512, (2, 16))).square().mean())

    def change():
        engine.step(1e-2)
        for layer in model.moe_layers():
            layer.expert_bias += 1

    compute()
    change()
    want = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    moments = {name: engine.adam.state[p]["exp_avg"].clone() for name, p in engine.parameters.items()}
    random_state = torch.get_rng_state()
    saver.save(3, engine, facts)
    compute()
    saver.settle()
    change()
    slow.set()
    saver.wait()
    reader = Reader(latest(tmp_path)).verify()
    assert torch.equal(reader.rng_state(), random_state)
    for name, tensor in want.items():
        assert torch.equal(reader.read(name), tensor), name
        assert name == "lm_head.weight" or not torch.equal(model.state_dict()[name], tensor), name
    assert all(torch.equal(reader.read(name, "exp_avg"), moment) for name, moment in moments.items())


def test_settle_waits_for_the_copy_and_not_for_the_write(engine, small_config, tmp_path, facts, slow, monkeypatch):
    saver = Writer(tmp_path, Groups(), small_config)
    assert saver.settle() < 60  # nothing was saved yet
    go, copied, copy = threading.Event(), threading.Event(), Staging.copy

    def late(self, tensors):
        assert go.wait(60)
        buffers = copy(self, tensors)
        copied.set()
        return buffers

    monkeypatch.setattr(Staging, "copy", late)
    saver.save(1, engine, facts)
    assert not copied.is_set()  # save did not wait for it
    threading.Timer(0.1, go.set).start()
    seconds = saver.settle()
    assert copied.is_set()
    assert seconds > 0
    assert latest(tmp_path) is None
    want = engine.model.model.norm.weight.clone()
    with torch.no_grad():
        engine.model.model.norm.weight.fill_(7)
    slow.set()
    saver.wait()
    assert torch.equal(Reader(latest(tmp_path)).read("model.norm.weight"), want)


@pytest.mark.parametrize("surfaces", ["poll", "wait", "save"])
def test_an_error_of_the_copy_is_one_of_the_write(engine, small_config, tmp_path, facts, monkeypatch, surfaces):
    saver = Writer(tmp_path, Groups(), small_config)
    with monkeypatch.context() as patch:
        patch.setattr(Staging, "copy", lambda self, tensors: (_ for _ in ()).throw(MemoryError("no room")))
        saver.save(1, engine, facts)
        saver.settle()  # does not hang
        ways = {
            "poll": lambda: poll_until_written(saver),
            "wait": saver.wait,
            "save": lambda: saver.save(2, engine, facts),
        }
        with pytest.raises(MemoryError, match="no room"):
            ways[surfaces]()
    saver.save(3, engine, facts)
    saver.wait()
    assert listing(tmp_path) == ["latest", "step-00000003"]


def test_too_little_memory_shows_at_once(engine, small_config, tmp_path, monkeypatch):
    def empty(*shape, **options):
        raise RuntimeError("can't allocate memory")

    monkeypatch.setattr(torch, "empty", empty)
    with pytest.raises(UserError, match=r"no memory for the copy .*: 2\.1 MiB in this process; .*asynchronous=false"):
        Writer(tmp_path, Groups(), small_config).reserve(engine)
    small_config.checkpoint.asynchronous = False
    Writer(tmp_path, Groups(), small_config).reserve(engine)


@pytest.mark.parametrize(("hang", "timeout"), [(1800, 900), (60, 30), (0, 1800), (86400, 1800)])
def test_rank_0_gives_up_before_the_watchdog(small_config, tmp_path, hang, timeout):
    small_config.faults.hang_seconds = hang
    assert Writer(tmp_path, Groups(), small_config).timeout == timeout


def test_both_ways_write_the_same_bytes(engine, small_config, tmp_path, facts):
    for asynchronous in (False, True):
        small_config.checkpoint.asynchronous = asynchronous
        saver = Writer(tmp_path / str(asynchronous), Groups(), small_config)
        saver.save(1, engine, facts)
        saver.wait()
        assert len(saver.poll()) == 1
    one, other = (Reader(latest(tmp_path / name)).records[0].sha256 for name in ("False", "True"))
    assert one == other


def test_a_save_waits_for_the_one_before(engine, small_config, tmp_path, facts, slow, monkeypatch):
    events = []

    def noted(function):
        def call(*args):
            result = function(*args)
            events.append(function.__name__)
            return result

        return call

    monkeypatch.setattr(Staging, "copy", noted(Staging.copy))
    monkeypatch.setattr(writer, "publish", noted(writer.publish))
    saver = Writer(tmp_path, Groups(), small_config)
    saver.save(1, engine, facts)
    threading.Timer(0.3, slow.set).start()
    saver.save(2, engine, facts)
    saver.wait()
    assert events == ["copy", "publish", "copy", "publish"]
    assert [written.step for written in saver.poll()] == [1, 2]
    assert latest(tmp_path).name == "step-00000002"


def test_the_newest_and_those_for_good_are_kept(engine, synchronous, tmp_path, facts):
    synchronous.checkpoint.keep, synchronous.checkpoint.keep_every = 2, 4
    saver = Writer(tmp_path, Groups(), synchronous)
    for step in range(2, 15, 2):
        saver.save(step, engine, facts)
    assert listing(tmp_path) == ["latest", *(f"step-{step:08d}" for step in (4, 8, 12, 14))]


def test_a_run_that_was_rolled_back_by_hand_goes_on_from_there(run, engine, synchronous, facts):
    (run / "checkpoints/latest").write_text("step-00000002\n")
    assert latest(run).name == "step-00000002"
    Writer(run, Groups(), synchronous).save(3, engine, facts)
    assert listing(run) == ["latest", "step-00000001", "step-00000002", "step-00000003"]
    weight = Reader(latest(run)).read("model.norm.weight")
    assert torch.equal(weight, engine.model.model.norm.weight)
    (run / "checkpoints/latest").write_text("step-00000001\n")
    Writer(run, Groups(), synchronous).save(2, engine, facts)
    assert listing(run) == ["latest", "step-00000001", "step-00000002"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_is_nearly_full_is_noticed_before_anything_is_written(
    run, engine, small_config, facts, monkeypatch, asynchronous
):
    small_config.checkpoint.asynchronous = asynchronous
    before = listing(run)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=16 << 20))
    with pytest.raises(
        UserError, match=r"needs 18\.1 MiB, and 16\.0 MiB of the disk are free; .* checkpoint\.keep \(3\)"
    ):
        Writer(run, Groups(), small_config).save(9, engine, facts)
    assert listing(run) == before


def save_and_wait(saver, step, engine, facts):
    saver.save(step, engine, facts)
    saver.wait()


def poll_until_written(saver):
    while not saver.poll():
        time.sleep(0.01)


class Full:
    """`write` of a file that finds no room after `left` bytes."""

    def __init__(self, left):
        self.left = left

    def __call__(self, path, head, buffers, *rest):
        def limited():
            for buffer in buffers:
                if len(buffer) > self.left:
                    yield buffer[: self.left]
                    raise FULL
                self.left -= len(buffer)
                yield buffer

        return self.write(path, head, limited())

    write = staticmethod(files.write)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_disk_that_fills_up_is_one_clear_error_and_loses_nothing(
    run, engine, small_config, facts, monkeypatch, asynchronous
):
    small_config.checkpoint.asynchronous, small_config.checkpoint.keep = asynchronous, 3
    before = listing(run)
    saver = Writer(run, Groups(), small_config)
    size = Reader(latest(run)).records[0].bytes - 20_000  # but for the header
    for left in [0, size, *(random.Random(0).randrange(size) for _ in range(5))]:
        with monkeypatch.context() as patch:
            patch.setattr(files, "write", Full(left))
            with pytest.raises(UserError, match=r"cannot write .*step-00000009.*No space left on device; make room or"):
                save_and_wait(saver, 9, engine, facts)
        assert listing(run) == before
        Reader(latest(run)).verify()
    saver.save(9, engine, facts)  # there is room again
    saver.wait()
    assert latest(run).name == "step-00000009"


def test_a_failure_shows_in_poll_and_in_the_next_save(run, engine, small_config, facts, monkeypatch):
    small_config.checkpoint.asynchronous = True
    saver = Writer(run, Groups(), small_config)
    with monkeypatch.context() as patch:
        patch.setattr(files, "write", Full(100))
        saver.save(9, engine, facts)
        with pytest.raises(UserError, match="No space left"):
            poll_until_written(saver)
        assert saver.poll() == []  # said once
        saver.save(9, engine, facts)
        with pytest.raises(UserError, match="No space left"):
            saver.save(10, engine, facts)
    assert latest(run).name == "step-00000003"


def test_a_limit_of_the_system_is_met_as_well(run, engine, synchronous, facts):
    """No stand-in: a child process may write 100 kB to a file, and not more."""
    if child := os.fork():
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert latest(run).name == "step-00000003"
        return
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        Writer(run, Groups(), synchronous).save(9, engine, facts)
    except UserError as error:
        os._exit(0 if "File too large" in str(error) and "step-00000009.partial" not in listing(run) else 2)
    except BaseException:
        os._exit(3)
    os._exit(4)


@pytest.mark.parametrize("operation", ["manifest", "sidecar", "publish"])
def test_a_failure_at_any_stage_loses_nothing(run, engine, synchronous, facts, monkeypatch, operation):
    def fails(*args):
        raise FULL

    name = {"manifest": "write_manifest", "sidecar": "write_atomic", "publish": "publish"}[operation]
    monkeypatch.setattr(writer, name, fails)
    before = listing(run)
    with pytest.raises(UserError, match="No space left"):
        Writer(run, Groups(), synchronous).save(9, engine, facts)
    assert listing(run) == before


def test_an_unwritable_place_is_one_clear_error(engine, small_config, tmp_path, facts):
    (tmp_path / "checkpoints").write_text("a file where the folder should be")
    with pytest.raises(UserError, match=r"cannot write checkpoint .*step-00000001\.partial: File exists"):
        Writer(tmp_path, Groups(), small_config).save(1, engine, facts)


def test_a_defect_of_ours_keeps_its_traceback(engine, small_config, tmp_path, monkeypatch):
    saver = Writer(tmp_path, Groups(), small_config)
    saver.save(1, engine, {"samples": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.wait()
    saver.save(1, engine, {"samples": object()})
    with pytest.raises(TypeError, match="not JSON serializable"):
        saver.save(2, engine, {})


def test_what_does_not_cover_the_network_is_never_published(engine, synchronous, tmp_path, facts):
    fragments = engine.fragments()
    engine.fragments = lambda: fragments[:-1]
    with pytest.raises(UserError, match=r"it holds 0 of the 64 elements of model\.norm\.weight"):
        Writer(tmp_path, Groups(), synchronous).save(1, engine, facts)
    assert listing(tmp_path) == []


# --- several ranks ----------------------------------------------------------------------------------------------------


@pytest.fixture
def four(small_config, tmp_path):
    """(writers, engines) of four ranks."""
    groups = world(ep=2, replicas=2)
    small_config.checkpoint.asynchronous = False
    state = random_state(small_config.model)
    return [Writer(tmp_path, g, small_config) for g in groups], engines(small_config.model, state, groups)


def save(four, step, facts):
    writers, ranks = four
    return together([w.groups for w in writers], lambda rank: writers[rank].save(step, ranks[rank], facts))


def test_ranks_write_their_own_files(four, tmp_path, facts):
    save(four, 5, facts)
    folder = latest(tmp_path)
    files_of_ranks = [f"rank-{rank:05d}.safetensors" for rank in range(4)]
    assert sorted(path.name for path in folder.iterdir()) == ["manifest.json", *files_of_ranks]
    written = [w.poll()[0] for w in four[0]]
    sizes = [(folder / name).stat().st_size for name in files_of_ranks]
    assert [w.bytes for w in written] == [sum(sizes), *sizes[1:]]
    assert {w.folder for w in written} == {folder}
    layout = {"world": 4, "engine": "deepspeed", "expert_parallel": 2, "tensor_parallel": 1, "zero_stage": 1}
    assert Reader(folder).manifest["layout"] == layout


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("bad", [0, 2])
def test_a_rank_that_fails_stops_all_of_them_by_its_name(four, tmp_path, facts, monkeypatch, bad, asynchronous):
    save(four, 5, facts)
    for w in four[0]:
        w.poll()
        w.cfg.checkpoint.asynchronous = asynchronous
    write = files.write

    def failing(path, *args):
        if path.name == f"rank-{bad:05d}.safetensors":
            raise FULL
        return write(path, *args)

    with monkeypatch.context() as patch:
        patch.setattr(files, "write", failing)
        results = save(four, 6, facts)
        if asynchronous:  # those who failed, and rank 0, learn it first; at the next save all of them
            results = save(four, 7, facts)
    for result in results:
        assert isinstance(result, UserError)
        assert f"step-00000006.partial/rank-{bad:05d}.safetensors: No space left" in str(result)
    assert listing(tmp_path) == ["latest", "step-00000005"]
    assert not any(isinstance(result, BaseException) for result in save(four, 6, facts))
    for w in four[0]:
        w.wait()
    assert latest(tmp_path).name == "step-00000006"


def test_rank_0_says_who_did_not_finish(four, tmp_path, facts, monkeypatch):
    writers, _ranks = four
    for w in writers:
        w.cfg.checkpoint.asynchronous = True
        w.timeout = 0.5
    given_up, write = threading.Event(), files.write

    def hanging(path, *args):
        if path.name in ("rank-00001.safetensors", "rank-00003.safetensors"):
            assert given_up.wait(60)
        while path.name == "rank-00000.safetensors" and not path.with_name("rank-00002.json").exists():
            time.sleep(0.01)
        return write(path, *args)

    monkeypatch.setattr(files, "write", hanging)
    save(four, 5, facts)
    with pytest.raises(UserError, match=r"ranks 1, 3 of 4 did not finish within 0\.5 s; is the folder on a disk"):
        writers[0].wait()
    given_up.set()
    for w in writers[1:]:
        with pytest.raises(UserError, match="No such file") if w.groups.rank != 2 else nothing():
            w.wait()
    assert latest(tmp_path) is None


def nothing():
    import contextlib

    return contextlib.nullcontext()


@pytest.mark.parametrize("asynchronous", [False, True])
def test_waiting_for_a_slow_disk_is_progress_and_for_a_dead_one_is_not(
    engine, small_config, tmp_path, facts, monkeypatch, asynchronous
):
    """Beats come while bytes move: a write longer than faults.hang_seconds must not end the run."""
    monkeypatch.setattr(writer, "BEAT_SECONDS", 0.01)
    moving, stuck = threading.Event(), threading.Event()
    beats: list[bool] = []

    def write(path, head, buffers, progress):
        for _ in range(3):
            progress(100)
            assert moving.wait(60)
        assert stuck.wait(60)  # nothing moves any more
        return real(path, head, buffers, lambda size: None)

    def beat():
        beats.append(True)
        if len(beats) == 2:
            threading.Timer(0.3, stuck.set).start()
        moving.set()

    real = files.write
    monkeypatch.setattr(files, "write", write)
    small_config.checkpoint.asynchronous = asynchronous
    saver = Writer(tmp_path, Groups(), small_config, beat)
    if asynchronous:
        saver.save(4, engine, facts)
        saver.wait()
    else:
        saver.save(4, engine, facts)
    assert 2 <= len(beats) <= 4  # not one for every look
    assert latest(tmp_path).name == "step-00000004"


def test_a_leftover_that_cannot_be_swept_away_does_not_stop_the_next_save(
    engine, synchronous, tmp_path, facts, monkeypatch
):
    left = tmp_path / "checkpoints/step-00000004.partial"
    left.mkdir(parents=True)
    (left / ".nfs0001").touch()
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: None)  # what is in use on NFS stays
    Writer(tmp_path, Groups(), synchronous).save(4, engine, facts)
    assert latest(tmp_path).name == "step-00000004"
    Reader(latest(tmp_path)).verify()
