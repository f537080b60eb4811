"""Near duplicates: documents whose sets of 5-word runs are alike, by MinHash signatures and bands.

A source at a time, in memory: 512 bytes a document. For more than some 20 million documents use datatrove's pipeline on
the shards of text before.
"""

import re
from collections.abc import Sequence

import numpy as np

from mm_train.cli import UserError

NUM_PERM = 128
BANDS = 16  # of 8 values each: two documents meet in a band with 95 % at a similarity of 0.8, with 6 % at 0.5
WORDS = 5
SEED = 1
WORD = re.compile(r"\w+")


def signatures(texts: Sequence[str]) -> np.ndarray:
    """uint32 [texts, NUM_PERM]. Raises UserError when rensa is not installed."""
    try:
        import rensa
    except ImportError:
        raise UserError('dedup minhash needs rensa: pip install "mobilemoe-train[quality]"') from None
    sets = []
    for text in texts:
        words = WORD.findall(text.lower())
        sets.append({" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))})
    digests = [sketch.digest() for sketch in rensa.RMinHash.from_token_sets(sets, NUM_PERM, SEED)]
    return np.array(digests, dtype=np.uint32).reshape(len(texts), NUM_PERM)


def near_duplicates(signature: np.ndarray, similarity: float) -> np.ndarray:
    """bool [documents]: which resemble one that comes before them, directly or by way of others.

    Of the documents that agree in a band, each is compared with the first and with the one before it; two are alike
    when at least `similarity` of their values agree.
    """
    count = len(signature)
    if not count:
        return np.zeros(0, dtype=np.bool_)
    first = np.arange(count)  # union-find; the root of a group is its earliest document

    def root(index: int) -> int:
        while first[index] != index:
            first[index] = index = first[first[index]]
        return index

    for band in np.split(signature, BANDS, axis=1):
        order = np.lexsort((np.arange(count), *band.T[::-1]))
        same = np.concatenate([[False], (band[order[1:]] == band[order[:-1]]).all(axis=1)])
        leaders = order[np.maximum.accumulate(np.where(same, 0, np.arange(count)))]  # the first of each bucket
        for place in np.flatnonzero(same):
            for other in {int(leaders[place]), int(order[place - 1])}:
                a, b = root(other), root(int(order[place]))
                if a != b and (signature[other] == signature[order[place]]).mean() >= similarity:
                    first[max(a, b)] = min(a, b)
    return first != np.arange(count)
