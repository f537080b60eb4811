import random

import numpy as np
import pytest

from data_prep.minhash import near_duplicates, signatures

pytest.importorskip("rensa", reason="the quality extra is not installed")


def shingles(text: str) -> set[str]:
    words = text.split()
    return {" ".join(words[i : i + 5]) for i in range(max(1, len(words) - 4))}


def test_signatures_estimate_the_similarity_of_sets():
    chance = random.Random(0)
    words = [f"w{i}" for i in range(400)]
    other = [word if chance.random() > 0.03 else "changed" for word in words]
    one, two = " ".join(words), " ".join(other)
    exact = len(shingles(one) & shingles(two)) / len(shingles(one) | shingles(two))
    signature = signatures([one, two, one.upper()])
    assert signature.shape == (3, 128)
    assert (signature[0] == signature[1]).mean() == pytest.approx(exact, abs=0.13)
    assert (signature[0] == signature[2]).all()


def test_near_duplicates_are_found_and_others_are_not():
    chance = random.Random(1)
    texts, expected = [], []
    for i in range(60):
        words = [f"{i}-{chance.randint(0, 99999)}" for _ in range(300)]
        texts.append(" ".join(words))
        expected.append(False)
        if i % 3 == 0:
            words[150] = "changed"  # 5 of 300 runs: similarity 0.97
            texts.append(" ".join(words))
            expected.append(True)
        if i % 5 == 0:
            texts.append(" ".join(words[:150] + [f"new{i}-{j}" for j in range(150)]))  # similarity 0.33
            expected.append(False)
    assert near_duplicates(signatures(texts), 0.8).tolist() == expected


def test_nothing_and_short_texts():
    assert near_duplicates(signatures([]), 0.8).tolist() == []
    assert near_duplicates(signatures(["", "a b", "c d", "a b"]), 0.8).tolist() == [False, False, False, True]
    assert signatures(["x"]).dtype == np.uint32
