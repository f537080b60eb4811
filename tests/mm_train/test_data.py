import shutil
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.cross_entropy import IGNORE
from mm_train.cli import UserError
from mm_train.data import Loader, collate
from mm_train.model import MobileMoE
from mm_train.order import BLOCK
from mm_train.shards import Row

MIXTURE = {"code": 3, "chat": 1}


def same(ours, want) -> bool:
    names = ("tokens_BT", "labels_BT", "document_BT", "cu_seqlens")
    pairs = [(getattr(ours, name), getattr(want, name)) for name in names]
    return all(torch.equal(*pair) for pair in pairs) and ours.sources == want.sources


@settings(max_examples=10)
@given(
    st.lists(
        st.tuples(st.sampled_from([1, 2, 4, 8, 16, 32, 64]), st.integers(0, 4), st.integers(0, 3)),
        min_size=1,
        max_size=4,
    ),
    st.integers(0, 2 * BLOCK),
)
def test_any_sequence_of_stops_worlds_and_workers_sees_the_stream_of_one(data_set, parts, first):
    """A run that is stopped after every step and goes on with another number of ranks and of threads."""
    plain = Loader(data_set, MIXTURE, 64, seed=0)
    for world, workers, ahead in parts:
        ranks = [Loader(data_set, MIXTURE, 64, 0, workers, ahead) for _ in range(min(world, 4))]
        for _ in range(2):  # steps until the next stop
            want = [plain.batch(first + 2 * i, 2) for i in range(64)]
            # Ranks beyond the fourth share a loader: its threads then are sent from place to place.
            shared = [list(ranks[r % 4].micro_batches(first, 128, 2, r, world)) for r in range(world)]
            assert all(same(shared[i % world][i // world], want[i]) for i in range(64))
            first += 128
        for loader in ranks:
            loader.close()


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(1, 64)), min_size=1, max_size=8), st.integers(0, 10**6))
def test_the_order_of_a_run_in_parts_is_that_of_one(data_set, parts, start):
    """(source, epoch, window) of every rank, over any world sizes, equal the uninterrupted run's."""
    mixture = Loader(data_set, MIXTURE, 64, seed=5).mixture
    first, seen = start, []
    for steps, world in parts:
        for _ in range(steps):
            ranks = [mixture.samples(first + 2 * r, first + 2 * r + 2) for r in range(world)]
            seen += [np.stack(rank) for rank in ranks]
            first += 2 * world
    assert np.array_equal(np.concatenate(seen, axis=1), np.stack(mixture.samples(start, first)))


def test_a_run_that_jumps_is_followed(data_set):
    loader, plain = (Loader(data_set, MIXTURE, 64, 0, workers) for workers in (2, 0))
    for first in (0, 16, 160, 32, 32):
        for ours, want in zip(*(each.micro_batches(first, 16, 4, 0, 1) for each in (loader, plain)), strict=True):
            assert same(ours, want)
    loader.close()


def test_threads_read_one_step_ahead_and_end(data_set):
    loader = Loader(data_set, MIXTURE, 64, 0, workers=3, ahead=1)
    asked = []
    batch = loader.batch
    loader.batch = lambda first, rows: asked.append(first) or batch(first, rows)
    list(loader.micro_batches(0, 16, 4, 0, 1))
    loader.close()
    assert sorted(asked)[:4] == [0, 4, 8, 12]
    assert set(asked) <= set(range(0, 32, 4))
    assert not [t for t in threading.enumerate() if t.name.startswith("read-ahead")]


def test_a_corrupt_shard_is_an_error_in_the_loop(data_set, tmp_path):
    folder = shutil.copytree(data_set, tmp_path / "data")
    shard = folder / "code" / "train" / "00000.tar"
    data = bytearray(shard.read_bytes())
    data[600:700] = bytes(100)
    shard.write_bytes(data)
    loader = Loader(folder, {"code": 1}, 64, 0, workers=2)
    with pytest.raises(UserError, match=r"corrupt block in shard .*00000\.tar: the tokens"):
        list(loader.micro_batches(0, 64, 2, 0, 1))
    loader.close()
    list(Loader(folder, {"code": 1}, 64, 0, checked=False).micro_batches(0, 64, 2, 0, 1))


def test_a_source_of_weight_0_need_not_be_there(data_set):
    loader, plain = (Loader(data_set, weights, 64, 0) for weights in ({"code": 1, "books": 0}, {"code": 1}))
    assert loader.identity == plain.identity


def test_another_seed_is_another_order(data_set):
    first, second = (Loader(data_set, {"code": 1}, 64, seed) for seed in (0, 1))
    assert first.identity != second.identity
    assert [first.mixture[k] for k in range(20)] != [second.mixture[k] for k in range(20)]


def test_labels_are_the_next_tokens_except_masked_ones_and_document_starts():
    tokens = np.array([10, 11, 12, 20, 21], dtype=np.uint32)
    mask = np.array([1, 0, 1, 1, 1], dtype=np.uint8)
    batch = collate([Row(tokens, mask, np.array([3])), Row(tokens, None, np.array([0, 4]))])
    assert batch.tokens_BT.tolist() == [[10, 11, 12, 20]] * 2
    assert batch.labels_BT.tolist() == [[IGNORE, 12, IGNORE, 21], [11, 12, 20, IGNORE]]
    assert batch.document_BT.tolist() == [[0, 0, 0, 1], [1, 1, 1, 1]]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 8]
    assert batch.max_seqlen == 4
    assert batch.positions_BT().tolist() == [[0, 1, 2, 0], [0, 1, 2, 3]]
    assert batch.num_scored == 5


rows_strategy = st.integers(2, 40).flatmap(
    lambda length: st.lists(
        st.lists(st.tuples(st.integers(0, 2**32 - 1), st.booleans(), st.booleans()), min_size=length, max_size=length),
        min_size=1,
        max_size=5,
    )
)


@given(rows_strategy, st.booleans())
def test_collate_is_what_its_plain_definition_says(rows, has_mask):
    tokens, mask, starts = (np.array([[cell[i] for cell in row] for row in rows]) for i in range(3))
    batch = collate(
        [
            Row(t.astype(np.uint32), m.astype(np.uint8) if has_mask else None, np.flatnonzero(s))
            for t, m, s in zip(tokens, mask, starts, strict=True)
        ]
    )
    scored = ~starts[:, 1:] & (mask[:, 1:] | (not has_mask))
    assert np.array_equal(batch.tokens_BT, tokens[:, :-1])
    assert np.array_equal(batch.labels_BT, np.where(scored, tokens[:, 1:], IGNORE))
    documents = starts[:, :-1].cumsum(1)
    assert np.array_equal(batch.document_BT, documents)
    begins = np.ones_like(documents, dtype=bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    assert batch.cu_seqlens.tolist() == [*np.flatnonzero(begins), documents.size]
    assert batch.max_seqlen == batch.cu_seqlens.diff().max()
    assert batch.positions_BT().flatten().tolist() == [
        i - max(b for b in np.flatnonzero(begins) if b <= i) for i in range(documents.size)
    ]


def test_errors_name_what_is_wrong(data_set, tmp_path):
    with pytest.raises(UserError, match=r"data set folder not found: .*nowhere"):
        Loader(tmp_path / "nowhere", {"code": 1}, 64, 0)
    with pytest.raises(UserError, match=r"no train split of source 'codes'; it has: chat, code"):
        Loader(data_set, {"codes": 1}, 64, 0)
    with pytest.raises(UserError, match=r"source 'code' of .* has not a single row of 1000000 tokens"):
        Loader(data_set, {"code": 1}, 10**6, 0)
    with pytest.raises(UserError, match="row_length"):
        Loader(data_set, {"chat": 1}, 32, 0)


def test_sft_scores_what_the_assistant_says_and_nothing_else(data_set, byte_tokenizer):
    """Real rows: what is a label is found from the control tokens alone, and what it says from the text."""
    loader = Loader(data_set, {"chat": 1}, 64, seed=0)
    tokenizer, said = byte_tokenizer, []
    for first in range(0, 64, 8):
        batch = loader.batch(first, 8)
        for tokens, labels, document in zip(batch.tokens_BT, batch.labels_BT, batch.document_BT, strict=True):
            answering, wanted = False, []
            row, answer = tokens.tolist(), tokenizer.headers["assistant"]
            for place, token in enumerate(row):
                last = place + 1 == len(row)
                answering |= row[max(0, place + 1 - len(answer)) : place + 1] == answer
                answering &= token != tokenizer.eot_id
                if not last and document[place] == document[place + 1]:
                    wanted.append(row[place + 1] if answering else IGNORE)
                else:  # the last label is of the row's end, which tokens do not show; one of another document is none
                    wanted.append(labels[place].item() if last else IGNORE)
            assert labels.tolist() == wanted
            said += [tokenizer.decode([x for x in labels.tolist() if x not in (IGNORE, tokenizer.eot_id)])]
    assert len("".join(said)) > 500
    assert "next?" not in "".join(said)  # what the user says


def test_a_longer_context_is_the_same_text_in_longer_rows(data_set, small_model):
    """Stream shards fit any length, and a network sees the beginning of a longer row as it sees a short one."""
    short, long = (Loader(data_set, {"code": 1}, length, seed=0).readers["code"] for length in (64, 128))
    assert long.num_windows(128) == short.num_windows(64) // 2
    row = long.row(1, 128)
    pair = [short.row(window, 64).tokens for window in (2, 3)]
    assert row.tokens.tolist() == [*pair[0][:-1].tolist(), *pair[1].tolist()]
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    tokens = torch.from_numpy(row.tokens[:-1].astype(np.int64))[None]
    torch.testing.assert_close(model(tokens)[:, :64], model(tokens[:, :64]), rtol=1e-5, atol=1e-5)
