"""How well a model without any learning compresses the held-out text: the numbers that a language model has to beat."""

import math
from pathlib import Path

import numpy as np

from mm_train.shards import ShardReader
from mm_train.tokenizer import Tokenizer

SPAN = 1 << 20  # tokens counted at a time
COUNTED = 1 << 27  # training tokens that frequencies are taken from; more would not change them


def baselines(source_folder: Path, tokenizer: Tokenizer) -> dict[str, float]:
    """Baselines of one source on its held-out split, over the tokens that a model is scored on.

    These are the tokens with mask 1, without the first of each document, which nothing foretells.
    bytes: UTF-8 bytes they stand for. unigram_bits_per_byte: their code length under the frequencies of the training
    split, one added to each count. zstd19_bits_per_byte: their text, concatenated, under `zstd -19`.
    All are 0 where nothing is held out.
    """
    import zstandard  # of the `data` extra; not needed to read or encode

    held_out = [tokens[1:][mask[1:]] for tokens, mask in ShardReader(source_folder / "val").documents()]
    val_counts = np.bincount(np.concatenate([[], *held_out]).astype(np.int64), minlength=tokenizer.vocab_size)
    text = "".join(tokenizer.decode(tokens.tolist()) for tokens in held_out)
    num_bytes = int(val_counts @ tokenizer.token_bytes().astype(np.int64))
    if not num_bytes:
        return {"bytes": 0, "unigram_bits_per_byte": 0.0, "zstd19_bits_per_byte": 0.0}
    train_counts = _train_counts(ShardReader(source_folder / "train"), tokenizer.vocab_size)
    surprise = math.log2(train_counts.sum() + tokenizer.vocab_size) - np.log2(train_counts + 1)
    compressed = zstandard.ZstdCompressor(level=19).compress(text.encode())
    return {
        "bytes": num_bytes,
        "unigram_bits_per_byte": round(float(val_counts @ surprise) / num_bytes, 4),
        "zstd19_bits_per_byte": round(8 * len(compressed) / num_bytes, 4),
    }


def _train_counts(reader: ShardReader, vocab_size: int) -> np.ndarray:
    counts = np.zeros(vocab_size, dtype=np.int64)
    size = min(reader.num_tokens, COUNTED)
    for begin in range(0, size, SPAN):
        tokens, mask, starts = reader.span(begin, min(begin + SPAN, size))
        counts += np.bincount(tokens[mask & ~starts], minlength=vocab_size)
    return counts
