import collections
import shutil

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_train import mixture_change
from mm_train.data import Loader
from mm_train.order import BLOCK
from mm_train.shards import ShardReader, ShardWriter
from tests.mm_train.test_data import same


def listed(loader, first, stop):
    columns = (values.tolist() for values in loader.mixture.samples(first, stop))
    return [(loader.mixture.names[s], epoch, window) for s, epoch, window in zip(*columns, strict=True)]


def opened(data_set, code, chat):
    return Loader(data_set, {"code": code, "chat": chat}, 64, seed=0)


@settings(max_examples=20)
@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9), st.integers(1, 2500)), min_size=1, max_size=4))
def test_nothing_is_read_twice_over_any_changes(data_set, parts):
    """Runs that go on with other shares, also none: in each source no (epoch, window) comes twice."""
    seen, identity, sample = [], None, 0
    for code, chat, samples in parts:
        loader = opened(data_set, code, chat) if chat else Loader(data_set, {"code": code}, 64, seed=0)
        if identity is not None:
            loader.follow(identity, sample, "continue")
        seen += listed(loader, sample, sample + samples)
        sample += samples
        identity = loader.identity
        again = Loader(data_set, loader._weights, 64, seed=0)  # the same command a second time
        assert again.follow(identity, sample, "refuse") is None
        assert again.identity == identity
        assert listed(again, sample, sample + 50) == listed(loader, sample, sample + 50)
    assert len(set(seen)) == len(seen)
    # What is passed over is less than a block a change, so no epoch is more than a block ahead of what was read.
    for source in ("code", "chat"):
        windows = ShardReader(data_set / source / "train").num_windows(64)
        read = collections.Counter(epoch for name, epoch, _ in seen if name == source)
        assert windows * max(read, default=0) - sum(read.values()) < BLOCK * len(parts)


def test_a_change_is_refused_unless_it_is_wanted(data_set):
    before = opened(data_set, 3, 1).identity
    loader = opened(data_set, 1, 1)
    assert loader.follow(before, 640, "refuse") is None
    assert loader.identity != before
    said = loader.follow(before, 640, "continue")
    assert said == "the mixture changes at sample 640: chat 250 -> 500 in 1000; code 750 -> 500 in 1000"
    since = loader.identity["since"]
    assert since["sample"] == 640
    assert {name: used["samples"] for name, used in since["used"].items()} == {"code": 750, "chat": 250}
    assert since["before"] == before["sources"]
    assert "earlier" not in since
    third = opened(data_set, 9, 1)
    third.follow(loader.identity, 700, "continue")
    assert third.identity["since"]["earlier"] == since
    assert third.identity["since"]["used"]["code"]["samples"] == 750 + 500


def test_batches_that_were_read_ahead_are_those_of_the_new_mixture(data_set):
    before = Loader(data_set, {"code": 1}, 64, seed=0).identity
    loader, plain = (Loader(data_set, {"code": 1, "chat": 4}, 64, 0, workers) for workers in (1, 0))
    list(loader.micro_batches(1600, 16, 4, 0, 1))  # has 1616 and what follows ready
    for each in (loader, plain):
        each.follow(before, 1616, "continue")
    ours, want = (list(each.micro_batches(1616, 16, 4, 0, 1)) for each in (loader, plain))
    assert all(same(*pair) for pair in zip(ours, want, strict=True))
    loader.close()


def test_another_seed_or_length_stays_another(data_set):
    before = opened(data_set, 3, 1).identity
    for loader in (Loader(data_set, {"code": 3, "chat": 1}, 64, seed=1), Loader(data_set, {"code": 1}, 32, seed=0)):
        loader.follow(before, 640, "continue")
        assert any(loader.identity[key] != before[key] for key in ("seed", "seq_len"))


def test_a_source_with_other_shards_starts_from_its_beginning(data_set, tmp_path):
    folder = shutil.copytree(data_set, tmp_path / "data")
    before = Loader(folder, {"code": 1, "chat": 1}, 64, seed=0).identity
    old = ShardReader(folder / "code" / "train")
    documents = [tokens.copy() for tokens, _ in old.documents()]
    facts = {"tokenizer_sha256": old.manifest.tokenizer_sha256, "vocab_size": old.manifest.vocab_size}
    writer = ShardWriter(folder, "code", "train", licence="PSF-2.0", domain="code", **facts)
    for document in documents[:2]:
        writer.add(document)
    writer.close()
    loader = Loader(folder, {"code": 1, "chat": 1}, 64, seed=0)
    said = loader.follow(before, 1500, "continue")
    assert said.endswith("code 500 -> 500 in 1000, from the beginning of other shards")
    assert loader.mixture.used == {"code": 0, "chat": 1000}


@pytest.mark.parametrize("used", [{}, {"code": {"samples": 5, "shards": "other"}}])
def test_uses_of_other_shards_do_not_count(used):
    assert mixture_change.uses({"used": used}, {"code": {"shards": "here"}}) == {}
