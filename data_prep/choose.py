"""Which documents of a source are duplicates, held out, and kept: from the indexes of its parts alone.

Every choice but that of the first among duplicates is made by hash, so it does not depend on the order of files, on
other sources or on chance.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from data_prep.collect import Report
from data_prep.minhash import near_duplicates

DOCUMENTS_AT_A_TIME = 1 << 25  # whose digests are sorted together: bounds memory
UNIQUE, DUPLICATE, NEAR_DUPLICATE = 0, 1, 2


def find_duplicates(parts: Sequence[Path], near: float | None = None) -> list[np.ndarray]:
    """uint8 [documents] for each part: UNIQUE, or DUPLICATE or NEAR_DUPLICATE of a document that comes before.

    Args:
        parts: folders that `collect` wrote, in order.
        near: the similarity from which on documents are near duplicates; None: only equal ones count.
    """
    digests = [np.load(part / "index.npy")["digest"] for part in parts]
    sizes = [len(part) for part in digests]
    kind = np.zeros(sum(sizes), dtype=np.uint8)
    rounds = -(-len(kind) // DOCUMENTS_AT_A_TIME)
    for turn in range(rounds):  # equal digests fall into one turn
        chosen = [np.flatnonzero(part[:, 1] % np.uint64(rounds) == turn) for part in digests]
        places = np.concatenate([first + some for first, some in zip(np.cumsum([0, *sizes]), chosen, strict=False)])
        some = np.concatenate([part[rows] for part, rows in zip(digests, chosen, strict=True)])
        order = np.lexsort((places, some[:, 1], some[:, 0]))
        repeated = (some[order[1:]] == some[order[:-1]]).all(axis=1)
        kind[places[order[1:][repeated]]] = DUPLICATE
    if near is not None:
        sketches = np.concatenate([np.load(part / "minhash.npy") for part in parts])
        unique = np.flatnonzero(kind == UNIQUE)
        kind[unique[near_duplicates(sketches[unique], near)]] = NEAR_DUPLICATE
    return np.split(kind, np.cumsum(sizes)[:-1])


def choose(
    index: np.ndarray, duplicates: np.ndarray, held_out: bool, fraction: float, max_bytes: int | None, report: Report
) -> np.ndarray:
    """Numbers of the documents of one split, in the order in which they are written; the others are counted.

    Without a limit documents come in reading order. With one, in the order of their hashes, passing over those that no
    longer fit into it; and candidates are only the documents with the lowest hashes that together are no more than
    twice the limit, so that one large document does not decide what comes after.
    """
    split = (index["share"] < fraction) == held_out
    for kind, reason in ((DUPLICATE, "duplicate"), (NEAR_DUPLICATE, "near duplicate")):
        repeated = split & (duplicates == kind)
        if repeated.any():
            report.drop(reason, int(index["bytes"][repeated].sum()), documents=int(repeated.sum()))
    numbers = np.flatnonzero(split & (duplicates == UNIQUE))
    if max_bytes is None:
        return numbers
    sizes = index["bytes"].astype(np.int64)
    candidates = numbers[sizes[numbers] <= max_bytes]
    digest = index["digest"][candidates]
    candidates = candidates[np.lexsort((digest[:, 1], digest[:, 0], index["rank"][candidates]))]
    candidates = candidates[np.cumsum(sizes[candidates]) <= 2 * max_bytes]
    kept, free = [], max_bytes
    for number in candidates:
        if sizes[number] <= free:
            kept.append(number)
            free -= int(sizes[number])
    left_out = np.setdiff1d(numbers, kept)
    if len(left_out):
        reason = f"over the {'val' if held_out else 'train'} limit"
        report.drop(reason, int(sizes[left_out].sum()), documents=len(left_out))
    return np.array(kept, dtype=np.int64)
