"""How fast the order of samples is computed, shards are read and batches are made, beside copying memory.

python -m mm_train.bench_data
python -m mm_train.bench_data --path data/pretrain --sources web,code --seq-len 8192
python -m mm_train.bench_data --simulate 6e12 --shards 60000

What is compared takes turns, so that what else the machine does hits all alike. Rates are of one thread's processor
time: median (lowest..highest), and the median ratio to copying the same tokens as they lie in memory.
--simulate makes a data set of so many tokens out of sparse files, and measures opening it and reading at both its ends.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mm_train import simulated
from mm_train.cli import UserError, command
from mm_train.order import BLOCK, Mixture, Samples
from mm_train.shards import ShardWriter
from mm_train.tokenizer import Tokenizer, assemble

EIGHT = {"web": 40, "books": 22, "math": 11.6, "code": 10, "wiki": 5, "papers": 5, "science": 4, "forums": 2.4}
TRILLIONS = 6 * 10**12
SAMPLES = 4000  # rows read in a round
POSITIONS = 256 * BLOCK  # of the order, in a round
MEGABYTE = 10**6


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.bench_data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--path", help="a data set folder (default: random tokens in a temporary one)")
    parser.add_argument("--sources", default="", help="comma-separated names, in equal parts (default: all there are)")
    parser.add_argument("--tokens", type=float, default=1e8, help="of the temporary data set (default: 1e8)")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens of a row (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows of a batch (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="(default: %(default)s)")
    parser.add_argument("--simulate", type=float, help="tokens of a data set to simulate instead, e.g. 6e12")
    parser.add_argument("--shards", type=int, default=60_000, help="of the simulated one (default: %(default)s)")
    parser.add_argument("--open", type=Path, help=argparse.SUPPRESS)  # what --simulate starts
    args = parser.parse_args(argv)
    if min(args.seq_len, args.rows, args.rounds, args.shards) < 1 or args.tokens < 1e6:
        raise UserError("--seq-len, --rows, --rounds and --shards must be at least 1, --tokens at least 1e6")
    if args.open is not None:
        print(json.dumps(open_simulated(args.open, args.seq_len)))
        return 0
    with tempfile.TemporaryDirectory(prefix="bench-data-") as temporary:
        folder = Path(temporary)
        if args.simulate is not None:
            write_simulated(folder, args.simulate, args.shards, args.seq_len)
            command_line = [
                sys.executable,
                "-m",
                "mm_train.bench_data",
                "--seq-len",
                str(args.seq_len),
                "--open",
                temporary,
            ]
            found = json.loads(subprocess.run(command_line, check=True, capture_output=True, text=True).stdout)
            print("\n".join(f"{name:44}{value:>20}" for name, value in found.items()))
            return 0 if found["rows that are not as they should be"] == 0 else 1
        path = Path(args.path) if args.path else folder
        if not args.path:
            write_random(folder, int(args.tokens))
        sources = args.sources.split(",") if args.sources else sorted(f.parent.name for f in path.glob("*/train"))
        measure(path, sources, args.seq_len, args.rows, args.rounds)
    return 0


# --- real shards ------------------------------------------------------------------------------------------------------


@dataclass
class Way:
    """Something that is measured: `run` deals with `count` of `unit`."""

    name: str
    unit: str
    count: int
    run: Callable[[], object]
    seconds: list[float] = field(default_factory=list)


def measure(path: Path, sources: Sequence[str], seq_len: int, rows: int, rounds: int) -> None:
    """Print the table. Raises UserError for a data set that cannot be read."""
    from mm_train.data import Loader

    weights = dict.fromkeys(sources, 1.0)
    loader, order = Loader(path, weights, seq_len, seed=0), _order_of_trillions()
    readers = [loader.readers[name] for name in loader.mixture.names]
    source, _, window = (values.tolist() for values in loader.mixture.samples(0, SAMPLES))
    places = list(zip(source, window, strict=True))
    target = np.empty((SAMPLES, seq_len + 1), dtype=np.uint32)
    memory = np.ones_like(target)
    done = [0]  # positions computed: each is computed once

    def copy_rows() -> None:
        for row, (s, w) in zip(target, places, strict=True):
            row[:] = readers[s].row(w, seq_len).tokens

    def make_batches(loader: Loader) -> None:
        for first in range(0, SAMPLES, rows):
            loader.batch(first, rows)

    def positions() -> None:
        order.samples(done[0], done[0] + POSITIONS)
        done[0] += POSITIONS

    tokens = SAMPLES * seq_len
    ways = [
        Way("memory copied", "tokens", tokens, lambda: np.copyto(target, memory)),
        Way("rows copied, in the order of the mixture", "tokens", tokens, copy_rows),
        Way("batches", "tokens", tokens, lambda: make_batches(loader)),
        Way(
            "batches, every block for the first time",
            "tokens",
            tokens,
            lambda: make_batches(Loader(path, weights, seq_len, 0)),
        ),
        Way("the order of 8 sources, 6 T tokens", "samples", POSITIONS, positions),
    ]
    for round_ in range(rounds + 1):  # the first one only warms up
        for way in ways:
            begin = time.process_time()
            way.run()
            if round_:
                way.seconds.append(time.process_time() - begin)
    print(f"{path}: {len(sources)} source(s), rows of {seq_len} tokens, batches of {rows}; M/s of processor time")
    for way in ways:
        rates = sorted(way.count / seconds / 1e6 for seconds in way.seconds)
        ratio = statistics.median(a / b for a, b in zip(ways[0].seconds, way.seconds, strict=True))
        share = f"{ratio:8.3f} of a copy" if way.unit == "tokens" else ""
        middle = statistics.median(rates)
        print(f"{way.name:42}{way.unit:8}{middle:9.4g}  ({rates[0]:.4g}..{rates[-1]:.4g}){share}")
    for workers in (0, 1, 2):
        waiting = _waiting(path, weights, seq_len, rows, workers)
        print(f"with {workers} thread(s) that read ahead, a step waits {waiting:.2f} ms for its batches")


def _waiting(path: Path, weights: dict[str, float], seq_len: int, rows: int, workers: int) -> float:
    """Milliseconds, median over steps of 4 batches, between which the processor has 20 ms to itself."""
    from mm_train.data import Loader

    loader = Loader(path, weights, seq_len, 0, workers)
    waits = []
    for first in range(0, 160 * rows, 4 * rows):
        begin = time.perf_counter()
        list(loader.micro_batches(first, 4 * rows, rows, 0, 1))
        waits.append(time.perf_counter() - begin)
        time.sleep(0.02)
    loader.close()
    return 1000 * statistics.median(waits)


def write_random(folder: Path, tokens: int) -> None:
    """Two sources of random tokens, in documents of log-normal length, 1000 tokens on average."""
    tokenizer, random = _bytes_tokenizer(), np.random.default_rng(0)
    tokenizer.save(folder)
    for source in ("one", "two"):
        writer = ShardWriter(
            folder,
            source,
            "train",
            tokenizer_sha256=tokenizer.sha256,
            vocab_size=tokenizer.vocab_size,
            licence="CC0-1.0",
            domain="random",
        )
        left = tokens // 2
        while left > 0:
            length = min(left, int(random.lognormal(6.4, 1)) + 1)
            writer.add(random.integers(tokenizer.vocab_size, size=length, dtype=np.uint32))
            left -= length
        writer.close()


# --- a simulated data set ---------------------------------------------------------------------------------------------


def write_simulated(folder: Path, tokens: float, shards: int, seq_len: int) -> None:
    """EIGHT sources with so many tokens in so many shards; the first and the last block of their order can be read."""
    blocks = round(tokens / shards / simulated.STEP)
    counts = {name: max(1, round(shards * weight / 100)) for name, weight in EIGHT.items()}
    counts["web"] += shards - sum(counts.values())
    mixture = Mixture(EIGHT, {name: _windows(count, blocks, seq_len) for name, count in counts.items()}, seed=0)
    source, _, window = (np.concatenate(parts) for parts in zip(*_ends(mixture), strict=True))
    windows = {name: window[source == i] for i, name in enumerate(mixture.names)}
    simulated.write_data_set(folder, counts, blocks, seq_len, windows, _bytes_tokenizer())


def open_simulated(folder: Path, seq_len: int) -> dict[str, Any]:
    """What opening it takes, and whether the rows at both ends of one epoch are the right ones."""
    from mm_train.data import Loader

    memory = _peak_memory()
    begin, worked = time.perf_counter(), time.process_time()
    loader = Loader(folder, EIGHT, seq_len, seed=0)
    opened, worked, opened_memory = time.perf_counter() - begin, time.process_time() - worked, _peak_memory()
    manifests = [reader.manifest for reader in loader.readers.values()]
    vocab_size, wrong, begin = manifests[0].vocab_size, 0, time.perf_counter()
    first, last = _ends(loader.mixture)
    for source, _, window in [*zip(*first, strict=True), *zip(*last, strict=True)]:
        name = loader.mixture.names[source]
        row = loader.readers[name].row(int(window), seq_len)
        want = simulated.tokens_at(name, int(window) * seq_len, (int(window) + 1) * seq_len + 1, vocab_size)
        wrong += not np.array_equal(row.tokens, want)
    return {
        "tokens": f"{sum(m.num_tokens for m in manifests):,}",
        "shards": sum(len(m.shards) for m in manifests),
        "sources": len(manifests),
        "seconds to open": round(opened, 2),
        "of them seconds of processor time": round(worked, 2),
        "MB of memory taken by that": round((opened_memory - memory) / MEGABYTE),
        "MB of memory at the end, torch included": round(_peak_memory() / MEGABYTE),
        "files open at the end": len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else "?",
        "rows read": len(first.source) + len(last.source),
        "milliseconds a row": round(1000 * (time.perf_counter() - begin) / (len(first.source) + len(last.source)), 2),
        "rows that are not as they should be": wrong,
    }


def _ends(mixture: Mixture) -> tuple[Samples, Samples]:
    """The first block of the order, and the last before the heaviest source begins anew."""
    blocks = min(mixture.num_windows[name] // quota for name, quota in mixture.quotas.items())
    return mixture.samples(0, BLOCK), mixture.samples((blocks - 1) * BLOCK, blocks * BLOCK)


def _windows(shards: int, blocks: int, seq_len: int) -> int:
    return (shards * blocks * simulated.STEP - 1) // seq_len


def _order_of_trillions() -> Mixture:
    return Mixture(EIGHT, {name: int(TRILLIONS * share / 100) // 2048 for name, share in EIGHT.items()}, seed=0)


def _bytes_tokenizer() -> Tokenizer:
    from tokenizers.pre_tokenizers import ByteLevel

    return assemble({char: i for i, char in enumerate(sorted(ByteLevel.alphabet()))}, [])


def _peak_memory() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    sys.exit(main())
