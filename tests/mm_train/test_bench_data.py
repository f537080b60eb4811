import os
import re

import numpy as np
import pytest

from mm_train import bench_data, simulated
from mm_train.cli import UserError
from mm_train.data import Loader
from mm_train.order import BLOCK
from mm_train.shards import MAX_OPEN_SHARDS
from tests.mm_train import order_reference

SEQ_LEN = 2048


def check(folder, tokens, shards):
    """Write and open a simulated data set; both ends of its order are held against the reference."""
    bench_data.write_simulated(folder, tokens, shards, SEQ_LEN)
    loader = Loader(folder, bench_data.EIGHT, SEQ_LEN, seed=0)
    mixture = loader.mixture
    last = min(mixture.num_windows[name] // quota for name, quota in mixture.quotas.items())
    vocab_size = loader.readers["web"].manifest.vocab_size
    for block in (0, last - 1):
        for k in range(block * BLOCK, (block + 1) * BLOCK, 8):
            want = [order_reference.sample(mixture.quotas, mixture.num_windows, 0, k + i) for i in range(8)]
            assert [tuple(mixture[k + i]) for i in range(8)] == want
            batch = loader.batch(k, 8)
            for row, labels, (source, _, window) in zip(batch.tokens_BT, batch.labels_BT, want, strict=True):
                begin = window * SEQ_LEN
                tokens = simulated.tokens_at(source, begin, begin + SEQ_LEN + 1, vocab_size)
                assert np.array_equal(row, tokens[:-1])
                scored = labels != -100
                assert np.array_equal(labels[scored], tokens[1:][scored])
                # A document begins at every multiple of STEP.
                assert np.flatnonzero(~scored).tolist() == [-(begin + 1) % simulated.STEP][: int((~scored).sum())]
    return loader


def test_both_ends_of_a_simulated_data_set(tmp_path, monkeypatch):
    loader = check(tmp_path, 5e9, 400)
    assert sum(len(reader.manifest.shards) for reader in loader.readers.values()) == 400
    assert sum(reader.num_tokens for reader in loader.readers.values()) == pytest.approx(5e9, rel=0.01)
    assert all(len(reader._open) <= MAX_OPEN_SHARDS for reader in loader.readers.values())
    with pytest.raises(UserError, match="corrupt"):  # what is not simulated cannot be read by mistake
        loader.batch(BLOCK, BLOCK)
    found = bench_data.open_simulated(tmp_path, SEQ_LEN)
    assert (found["rows read"], found["rows that are not as they should be"]) == (2 * BLOCK, 0)
    monkeypatch.setattr(simulated, "tokens_at", lambda *place: np.zeros(SEQ_LEN + 1))
    assert bench_data.open_simulated(tmp_path, SEQ_LEN)["rows that are not as they should be"] == 2 * BLOCK


def test_nothing_is_opened_before_it_is_needed(tmp_path):
    bench_data.write_simulated(tmp_path, 1e9, 100, SEQ_LEN)
    before = len(os.listdir("/proc/self/fd"))
    loader = Loader(tmp_path, bench_data.EIGHT, SEQ_LEN, seed=0)
    assert len(os.listdir("/proc/self/fd")) == before
    loader.batch(0, 1)
    assert len(os.listdir("/proc/self/fd")) == before + 1


@pytest.mark.slow
def test_six_trillion_tokens_in_60_000_shards(tmp_path, capsys):
    check(tmp_path, 6e12, 60_000)
    assert bench_data.main(["--simulate", "6e12"]) == 0
    found = dict(re.findall(r"(\S.*?)  +([\d.,]+)\n", capsys.readouterr().out))
    assert found["shards"] == "60000"
    assert float(found["of them seconds of processor time"]) <= 3  # others may want the processor too
    assert int(found["MB of memory at the end, torch included"]) <= 500


def test_the_commands(tmp_path, capsys):
    arguments = ["--tokens", "2e6", "--rounds", "1", "--seq-len", "64"]
    assert bench_data.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "memory copied" in printed
    assert "with 2 thread(s) that read ahead, a step waits" in printed
    assert bench_data.main(["--rows", "0"]) == 2
    assert "--rows" in capsys.readouterr().err
    assert bench_data.main(["--path", str(tmp_path / "none"), "--sources", "a"]) == 2
