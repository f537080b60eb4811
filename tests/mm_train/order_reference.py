"""The order of samples as first written, one at a time in Python's own numbers: what order.py is held against."""

import hashlib

BLOCK = 1000


def sample(weights, num_windows, seed, k):
    """(source, epoch, window) of sample k; `weights` are whole numbers of samples in BLOCK."""
    owner = [name for name, count in sorted(weights.items()) for _ in range(count)]
    block, slot = divmod(k, BLOCK)
    slot = feistel(slot, BLOCK, key(seed, "block", block))
    source = owner[slot]
    use = block * weights[source] + slot - owner.index(source)
    epoch, row = divmod(use, num_windows[source])
    return source, epoch, feistel(row, num_windows[source], key(seed, source, epoch))


def key(seed, name, number):
    digest = hashlib.blake2b(f"{seed}/{name}/{number}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def feistel(index, size, key):
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for round_ in range(4):
            left, right = right, left ^ (mix(right ^ mix(key + round_)) & mask)
        index = (left << half) | right
        if index < size:
            return index


def mix(x):
    x = (x + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
    return x ^ (x >> 31)
