import math

import pytest
import zstandard

from data_prep.baselines import baselines
from mm_train.shards import ShardWriter


def write(folder, tokenizer, split, documents, masked):
    out = ShardWriter(
        folder,
        "a",
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        licence="x",
        domain="x",
        has_mask=masked,
    )
    for text in documents:
        ids = [tokenizer.bos_id, *tokenizer.encode(text), tokenizer.eos_id]
        out.add(ids, [letter != "-" for letter in f"^{text}$"] if masked else None)
    out.close()


@pytest.mark.parametrize("masked", [False, True])
def test_against_a_count_by_hand(tmp_path, byte_tokenizer, masked):
    train, val = ["aab-", "b-"], ["ab-c", "é"]
    write(tmp_path, byte_tokenizer, "train", train, masked)
    write(tmp_path, byte_tokenizer, "val", val, masked and all(len(text.encode()) == len(text) for text in val))
    dashes = 0 if masked else 2
    total = 2 + 2 + 2 + dashes + byte_tokenizer.vocab_size  # a a, b b, two ends, and one more of each token
    # held out: a, b, -, c, the two bytes of é, two ends. Val has no mask, so its dash counts.
    counts = {"a": 2, "b": 2, "-": dashes, "c": 0, "é1": 0, "é2": 0, "end": 2, "end2": 2}
    bits = sum(math.log2(total) - math.log2(count + 1) for count in counts.values())
    found = baselines(tmp_path / "a", byte_tokenizer)
    assert found["bytes"] == 6
    assert found["unigram_bits_per_byte"] == pytest.approx(bits / 6, abs=1e-4)
    compressed = zstandard.ZstdCompressor(level=19).compress("ab-cé".encode())
    assert found["zstd19_bits_per_byte"] == pytest.approx(8 * len(compressed) / 6, abs=1e-4)


def test_only_trained_tokens_of_the_held_out_split_count(tmp_path, byte_tokenizer):
    write(tmp_path, byte_tokenizer, "train", ["a-"], True)
    write(tmp_path, byte_tokenizer, "val", ["a--b"], True)
    assert baselines(tmp_path / "a", byte_tokenizer)["bytes"] == 2


def test_nothing_held_out(tmp_path, byte_tokenizer):
    write(tmp_path, byte_tokenizer, "train", ["a"], False)
    write(tmp_path, byte_tokenizer, "val", [], False)
    assert baselines(tmp_path / "a", byte_tokenizer) == {
        "bytes": 0,
        "unigram_bits_per_byte": 0.0,
        "zstd19_bits_per_byte": 0.0,
    }
