"""Reading: any layout's checkpoint into any layout, any block, and what is refused. Damage: test_damage."""

import dataclasses
import shutil

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train import config
from mm_train.checkpoint import reader as reader_module
from mm_train.checkpoint.files import VectorFile
from mm_train.checkpoint.folders import latest
from mm_train.checkpoint.reader import Reader, check_data, open_newest, restore
from mm_train.checkpoint.writer import Writer
from mm_train.cli import UserError
from mm_train.engine import PlainEngine
from mm_train.inventory import KINDS, is_buffer
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.sharding import Box, local_boxes
from tests.mm_train.checkpoint.layouts import FACTS, LEAST, ThreadGroups, engines, random_state, together, world

LAYOUTS = [(ep, tp, replicas) for ep in (1, 2, 4) for tp in (1, 2) for replicas in (1, 2)]


def write(run_dir, groups, ranks, facts=FACTS):
    """A checkpoint of step 5 by all ranks together; its folder."""
    cfg = config.Config(model=LEAST, checkpoint=config.Checkpoint(asynchronous=False))
    writers = [Writer(run_dir, member, cfg) for member in groups]
    for result in together(groups, lambda rank: writers[rank].save(5, ranks[rank], facts)):
        assert isinstance(result, float), result
    return latest(run_dir)


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """(state, layout -> folder of a checkpoint of it)"""
    state = random_state(LEAST)
    folders = {}
    for ep, tp, replicas in LAYOUTS:
        groups = world(ep, tp, replicas)
        folder = tmp_path_factory.mktemp("stored")
        folders[ep, tp, replicas] = write(folder, groups, engines(LEAST, state, groups))
    return state, folders


def test_few_files_are_open_at_a_time(stored, monkeypatch):
    state, folders = stored
    monkeypatch.setattr(reader_module, "OPEN_FILES", 1)
    found = Reader(folders[4, 2, 2])
    for name in found.names():
        assert torch.equal(found.read(name), state["weight"][name])
        assert len(found._opened) == 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_whole_tensors_are_read_whatever_layout_wrote_them(stored, layout):
    state, folders = stored
    reader = Reader(folders[layout]).verify()
    assert len(reader.records) == layout[0] * layout[1] * layout[2]
    for kind in KINDS:
        for name, tensor in state[kind].items():
            assert torch.equal(reader.read(name, kind), tensor), (kind, name)
    assert all(torch.equal(tensor, state["weight"][name]) for name, tensor in reader.weights().items())


@pytest.mark.parametrize("source", LAYOUTS, ids=str)
def test_every_layout_is_restored_from_every_other(stored, source):
    state, folders = stored
    reader = Reader(folders[source])
    for ep, tp, replicas in LAYOUTS:
        groups = world(ep, tp, replicas)
        fresh = engines(LEAST, random_state(LEAST, seed=9), groups)
        for engine, member in zip(fresh, groups, strict=True):
            assert not engine.is_like(state)
            restore(reader, engine, member)
            assert engine.is_like(state)
            assert engine.step == 5


@settings(max_examples=15)
@given(st.data())
def test_parts_cut_anywhere_make_any_block(tmp_path_factory, data):
    ep, tp = data.draw(st.sampled_from([1, 2, 4])), data.draw(st.sampled_from([1, 2]))
    groups = world(ep, tp, data.draw(st.integers(1, 4)))
    state = random_state(LEAST, data.draw(st.integers(0, 1000)))

    def cut(size, ranks):
        places = st.lists(st.integers(0, size), min_size=ranks - 1, max_size=ranks - 1)
        return sorted(data.draw(places))

    folder = write(tmp_path_factory.mktemp("cut"), groups, engines(LEAST, state, groups, cut))
    reader = Reader(folder)
    for name, tensor in state["exp_avg"].items():
        low = [data.draw(st.integers(0, n - 1)) for n in tensor.shape]
        box = Box(tuple(low), tuple(data.draw(st.integers(1, n - a)) for a, n in zip(low, tensor.shape, strict=True)))
        want = tensor[box.slices]
        assert torch.equal(reader.read(name, "exp_avg", box), want), (name, box)
        start = data.draw(st.integers(0, box.size))
        stop = data.draw(st.integers(start, box.size))
        assert torch.equal(reader.read_range(name, "exp_avg", box, start, stop), want.reshape(-1)[start:stop])
    shutil.rmtree(folder.parent.parent)


@pytest.mark.parametrize("piece_bytes", [1, 64, 1 << 20])
def test_what_has_to_be_cut_is_read_in_pieces(stored, monkeypatch, piece_bytes):
    monkeypatch.setattr(reader_module, "PIECE_BYTES", piece_bytes)
    state, folders = stored
    reader = Reader(folders[1, 1, 2])
    for name, tensor in state["weight"].items():
        for place in [member.place for member in world(4, 2)]:
            (box,) = [box for entry, box in local_boxes(LEAST, place) if entry.name == name]
            assert torch.equal(reader.read(name, "weight", box), tensor[box.slices])


def test_only_what_is_wanted_is_read(stored, monkeypatch):
    wanted = []
    read_into = VectorFile.read_into

    def counting(self, key, start, target):
        wanted.append(len(target))
        read_into(self, key, start, target)

    monkeypatch.setattr(VectorFile, "read_into", counting)
    _state, folders = stored
    name = "model.layers.0.feed_forward.experts.down_proj"  # [4, 3, 4]
    for layout in LAYOUTS:
        reader = Reader(folders[layout])
        wanted.clear()
        reader.read(name, "exp_avg", Box((2, 0, 0), (1, 3, 4)))
        reader.read_range(name, "exp_avg", Box((1, 0, 0), (3, 3, 4)), 10, 17)
        assert sum(wanted) == 4 * (12 + 7)


def test_a_real_run_comes_back_bit_for_bit(engine, synchronous, tmp_path, facts):
    state = torch.get_rng_state()
    Writer(tmp_path, Groups(), synchronous).save(2, engine, facts)
    torch.rand(5)
    fresh = PlainEngine(MobileMoE(synchronous.model), synchronous.optim)
    reader = open_newest(tmp_path, Groups(), print)
    restore(reader, fresh, Groups())
    assert torch.equal(torch.get_rng_state(), state)
    for name, value in engine.model.state_dict().items():
        assert torch.equal(fresh.model.state_dict()[name], value), name
    for ours, want in zip(fresh.model.parameters(), engine.model.parameters(), strict=True):
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(fresh.adam.state[ours][key], engine.adam.state[want][key])
            assert fresh.adam.state[ours][key].any()
        assert fresh.adam.state[ours]["step"] == 2


def test_random_state_is_the_main_rank_s(stored):
    _, folders = stored
    groups = world(2)
    ranks = engines(LEAST, random_state(LEAST), groups)
    torch.manual_seed(123)
    before = torch.get_rng_state()
    restore(Reader(folders[1, 1, 1]), ranks[1], groups[1])
    assert torch.equal(torch.get_rng_state(), before)
    restore(Reader(folders[1, 1, 1]), ranks[0], groups[0])
    assert not torch.equal(torch.get_rng_state(), before)


def test_what_is_not_there_is_named(run):
    reader = Reader(latest(run))
    with pytest.raises(UserError, match=r"has no tensor model\.nothing"):
        reader.read("model.nothing")
    with pytest.raises(UserError, match=r"has no exp_avg of model\.layers\.0\.feed_forward\.expert_bias"):
        reader.read("model.layers.0.feed_forward.expert_bias", "exp_avg")
    with pytest.raises(UserError, match=r"has no momentum of model\.norm\.weight"):
        reader.read("model.norm.weight", "momentum")


def test_names_are_those_of_the_model(run, small_model):
    assert Reader(latest(run)).names() == list(inventory_order(small_model))


def inventory_order(model):
    from mm_train import inventory

    return [entry.name for entry in inventory.tensors(model)]


def test_only_biases_are_buffers(small_model):
    names = [name for name, _ in MobileMoE(small_model).named_buffers()]
    assert [name for name in inventory_order(small_model) if is_buffer(name)] == names


# --- what a run may go on from ----------------------------------------------------------------------------------------


def test_another_model_is_refused_with_the_difference_named(run, small_config):
    reader = Reader(latest(run))
    reader.check_model(dataclasses.replace(small_config.model, name="other"))
    other = dataclasses.replace(small_config.model, num_experts_per_tok=4)
    with pytest.raises(UserError, match=r"of another model: model.num_experts_per_tok is 2 there and 4 here"):
        reader.check_model(other)


def identity(**changes):
    sources = {"code": {"samples_in_1000": 1000, "shards": "a" * 64}}
    return {"seed": 0, "seq_len": 64, "sources": sources} | changes


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"seed": 1}, r"train\.seed is 0 there and 1 here"),
        ({"seq_len": 128}, r"data\.seq_len is 64 there and 128 here"),
        ({"sources": {"chat": {"samples_in_1000": 1000, "shards": "a" * 64}}}, "its source code is missing here"),
        (
            {"sources": identity()["sources"] | {"chat": {"samples_in_1000": 0, "shards": "b" * 64}}},
            "source chat is not among its sources",
        ),
        (
            {"sources": {"code": {"samples_in_1000": 750, "shards": "a" * 64}}},
            "samples in 1000: 1000 there and 750 here",
        ),
        (
            {"sources": {"code": {"samples_in_1000": 1000, "shards": "b" * 64}}},
            "sha256 of its shards: aaaaaaaaaaaa there",
        ),
        ({"order": "sorted"}, "order differs"),
    ],
)
def test_other_data_are_refused_with_the_difference_named(run, changes, problem):
    check_data(Reader(latest(run)), identity(), 8)
    with pytest.raises(
        UserError, match="was trained on other data: .*" + problem + ".*use a new run.dir with init_from"
    ):
        check_data(Reader(latest(run)), identity(**changes), 8)


@pytest.mark.parametrize(
    ("samples", "rows", "problem"),
    [
        (5 * 8, 8, None),
        (5 * 8 + 3 * 8, 8, None),  # three steps' data were left out after a rollback
        (5 * 8, 4, "had 8 rows a step, now 4"),
        (5 * 8 + 3, 8, "says that 43 samples made 5 steps of 8"),
        (4 * 8, 8, "says that 32 samples made 5 steps of 8"),
    ],
)
def test_the_rows_of_a_step_have_to_be_the_same(tmp_path, samples, rows, problem):
    groups = world()
    ranks = engines(LEAST, random_state(LEAST), groups)
    reader = Reader(write(tmp_path, groups, ranks, FACTS | {"samples": samples}))
    if problem is None:
        check_data(reader, identity(), rows)
    else:
        with pytest.raises(UserError, match=problem):
            check_data(reader, identity(), rows)


@pytest.mark.parametrize("key", FACTS)
def test_what_a_run_cannot_go_on_without_is_named(tmp_path, key):
    groups = world()
    ranks = engines(LEAST, random_state(LEAST), groups)
    facts = {name: value for name, value in FACTS.items() if name != key}
    with pytest.raises(UserError, match=f"does not say its {key}: nothing can be continued from it"):
        check_data(Reader(write(tmp_path, groups, ranks, facts)), identity(), 8)


def test_a_run_without_checkpoints_has_none(tmp_path):
    said = []
    assert open_newest(tmp_path, Groups(), said.append) is None
    (tmp_path / "checkpoints/step-00000001.partial").mkdir(parents=True)
    assert open_newest(tmp_path, Groups(), said.append) is None
    assert said == []
    (tmp_path / "checkpoints/latest").write_text("step-00000001\n")
    with pytest.raises(
        UserError, match=r"latest is there, but no checkpoint is: remove it if training is to start anew"
    ):
        open_newest(tmp_path, Groups(), said.append)


def test_ranks_share_the_hashing_and_agree(stored, tmp_path, monkeypatch):
    _, folders = stored
    root = tmp_path / "checkpoints"
    for step in (5, 6):
        shutil.copytree(folders[2, 1, 2], root / f"step-{step:08d}")
    bad = root / "step-00000006" / "rank-00002.safetensors"
    content = bytearray(bad.read_bytes())
    content[-1] ^= 1
    bad.write_bytes(content)
    hashed, damaged_files = [], reader_module.damaged_files
    monkeypatch.setattr(
        reader_module, "damaged_files", lambda folder, records: hashed.extend(records) or damaged_files(folder, records)
    )
    groups = world(3)
    said: list[list[str]] = [[] for _ in groups]
    readers = together(groups, lambda rank: open_newest(tmp_path, groups[rank], said[rank].append))
    assert [reader.folder.name for reader in readers] == ["step-00000005"] * 3
    assert said[1:] == [[], []]
    why = "rank-00002.safetensors: its sha256 is not the one in the manifest"
    assert said[0][-1] == f"checkpoint step-00000006 is damaged: {why}; trying step-00000005"
    assert len(hashed) == 8  # four files of each checkpoint, once
    results = together(groups, lambda rank: Reader(root / "step-00000006").verify(groups[rank]))
    assert {str(result) for result in results} == {f"checkpoint {root / 'step-00000006'} is damaged: {why}"}


def test_an_old_checkpoint_is_refused_and_not_passed_over(run):
    (run / "checkpoints/step-00000003/manifest.json").write_text('{"format": "mobilemoe-checkpoint-1", "step": 3}')
    groups = [ThreadGroups()]
    (result,) = together(groups, lambda rank: open_newest(run, groups[rank], print))
    assert isinstance(result, UserError)
    assert "is of the format mobilemoe-checkpoint-1; this version reads mobilemoe-checkpoint-2 only: train anew" in str(
        result
    )
