"""Prepares a data set: documents to token shards, with a tokenizer, a held-out split and baselines.

OUT/NAME/train and OUT/NAME/val are the shards of source NAME, OUT/dataset.json sums up, OUT/tokenizer.json encodes.
Running it again continues interrupted work, redoes what has changed (configuration or input), and otherwise does
nothing. The same input gives the same bytes.
"""

import argparse
import contextlib
import dataclasses
import fcntl
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data_prep.baselines import baselines
from data_prep.collect import SPLITS, Report, collect, read_spool, source_key
from data_prep.config import DataConfig, SourceConfig, TokenizerConfig, load
from data_prep.encode import TokenizerFile, encode_spool, write_packed, write_stream
from data_prep.train_bpe import train_bpe
from mm_train.cli import UserError, command
from mm_train.files import write_atomic
from mm_train.shards import Manifest, ShardReader, ShardWriter
from mm_train.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """examples:
  python -m data_prep.run configs/data/quickstart.yaml
  python -m data_prep.run configs/data/quickstart.yaml --out data/llama3 tokenizer.kind=llama3
  python -m data_prep.run my.yaml --workers 16 sources.books.max_bytes=100000000
"""


def prepare(config: DataConfig, workers: int) -> dict[str, Any]:
    """Bring the data set of `config` into being; returns the content of its dataset.json.

    Raises UserError for bad input and OSError where the output cannot be written.
    """
    out = Path(config.out)
    keys = {name: source_key(source, config.validation_fraction) for name, source in config.sources.items()}
    key = _hash(keys, dataclasses.asdict(config.tokenizer), config.shard_tokens)
    finished = _read_finished(out, key)
    if finished:
        print(f"{out} is up to date")
        return finished
    with _work_folder(out) as work, _processes(workers) as pool:
        spools = {name: work / f"{name}-{key[:16]}" for name, key in keys.items()}
        reports = _collect_all(config, spools, pool)
        tokenizer = _make_tokenizer(config.tokenizer, list(spools.values()))
        (out / "dataset.json").unlink(missing_ok=True)
        tokenizer.save(out)
        sources = {}
        for name, source in config.sources.items():
            shard_key = _hash(keys[name], tokenizer.sha256, config.shard_tokens)
            manifests = {
                split: _write_split(config, name, split, spools[name], tokenizer, shard_key, pool) for split in SPLITS
            }
            sources[name] = _summarise(source, manifests, reports[name])
        scores = {name: baselines(out / name, tokenizer) for name in tqdm(sources, desc="baselines", disable=None)}
        write_atomic(out / "baselines.json", _json(scores))
        summary = {
            "key": key,
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "sources": sources,
            "totals": {
                split: {
                    unit: sum(source[split][unit] for source in sources.values())
                    for unit in ("tokens", "documents", "bytes")
                }
                for split in SPLITS
            },
        }
        write_atomic(out / "dataset.json", _json(summary))
    shutil.rmtree(work)
    return summary


@contextlib.contextmanager
def _work_folder(out: Path) -> Iterator[Path]:
    """OUT/.work for what is needed to continue, locked: two preparations at once would mix their shards."""
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    with (work / "lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another preparation is writing to {out}: wait for it or choose another --out") from None
        for unfinished in work.glob("*.tmp"):
            shutil.rmtree(unfinished)
        yield work


@contextlib.contextmanager
def _processes(workers: int) -> Iterator[Executor]:
    """Worker processes, spawned: forking is unsafe once the tokenizer has threads."""
    pool = ProcessPoolExecutor(workers, get_context("spawn"), _start_worker)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, what is queued is not worth waiting for


def _start_worker() -> None:
    """A worker ends at once and silently on Ctrl-C, and when its parent is gone, even by kill -9."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(1))
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


def _collect_all(config: DataConfig, spools: dict[str, Path], pool: Executor) -> dict[str, Report]:
    """Collect the sources side by side."""
    fraction = config.validation_fraction
    futures = [pool.submit(collect, name, source, fraction, spools[name]) for name, source in config.sources.items()]
    for future in tqdm(as_completed(futures), desc="collect", total=len(futures), unit="source", disable=None):
        future.result()  # the first error ends the wait
    return dict(zip(config.sources, (future.result() for future in futures), strict=True))


def _make_tokenizer(config: TokenizerConfig, spools: list[Path]) -> Tokenizer:
    if config.kind == "llama3":
        return load_tokenizer("llama3")
    if config.kind == "folder":
        return load_tokenizer(str(config.path))
    return train_bpe((text for spool in spools for text in _sample(spool, config.sample_bytes)), config.vocab_size)


def _sample(spool: Path, max_bytes: int) -> Iterator[str]:
    """Training text of one source for the tokenizer to learn from."""
    for document in read_spool(spool / "train.jsonl"):
        max_bytes -= document.num_bytes
        if max_bytes < 0:
            return
        yield from (message["content"] for message in document.messages)
        yield document.text


def _write_split(
    config: DataConfig, name: str, split: str, spool: Path, tokenizer: Tokenizer, key: str, pool: Executor
) -> Manifest:
    """Shards of one split, unless they are there already."""
    source, out = config.sources[name], Path(config.out)
    with contextlib.suppress(UserError):
        manifest = ShardReader(out / name / split).manifest
        if manifest.extra.get("key") == key:
            return manifest
    file = spool / f"{split}.jsonl"
    writer = ShardWriter(
        out,
        name,
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        licence=source.licence,
        domain=source.domain,
        layout=source.layout,
        row_length=source.row_length,
        has_mask=source.layout == "packed",
        shard_tokens=config.shard_tokens,
    )
    with tqdm(total=file.stat().st_size, desc=f"encode {name}/{split}", unit="B", unit_scale=True, disable=None) as bar:
        documents = encode_spool(file, TokenizerFile(out, tokenizer.sha256), source.row_length, pool, bar.update)
        extra: dict[str, Any] = {"key": key}
        if source.row_length is None:
            write_stream(documents, writer)
        else:
            extra |= dataclasses.asdict(write_packed(documents, writer, source.row_length, tokenizer.pad_id))
    return writer.close(extra)


def _summarise(source: SourceConfig, manifests: dict[str, Manifest], report: Report) -> dict[str, Any]:
    dropped = {reason: tuple(count) for reason, count in sorted(report.dropped.items())}
    too_long = [manifest.extra["dropped"] for manifest in manifests.values() if "dropped" in manifest.extra]
    if any(documents for documents, _ in too_long):
        dropped["longer than a row"] = tuple(map(sum, zip(*too_long, strict=True)))
    splits = {
        split: {
            "tokens": manifest.num_tokens,
            "padding": manifest.num_padding,
            "documents": manifest.num_documents,
            "bytes": manifest.num_bytes,
            "manifest_sha256": manifest.sha256,
        }
        for split, manifest in manifests.items()
    }
    return {
        "licence": source.licence,
        "domain": source.domain,
        "layout": source.layout,
        "row_length": source.row_length,
        **splits,
        "texts_cut_into_rows": sum(manifest.extra.get("cut", 0) for manifest in manifests.values()),
        "dropped": {reason: {"documents": count[0], "bytes": count[1]} for reason, count in dropped.items()},
    }


def _read_finished(out: Path, key: str) -> dict[str, Any] | None:
    """dataset.json when it belongs to `key` and all that it stands for is there, else None."""
    try:
        summary = json.loads((out / "dataset.json").read_bytes())
        others = ("baselines.json", "tokenizer.json", "tokenizer_config.json")
        if summary["key"] != key or not all((out / name).is_file() for name in others):
            return None
        for name in summary["sources"]:
            for split in SPLITS:
                ShardReader(out / name / split)
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None
    return summary


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()


def describe(summary: dict[str, Any]) -> str:
    """The tables that end a preparation: what is in the data set, and what is not and why."""
    lines = [f"{'source':12}{'split':7}{'documents':>11}{'tokens':>13}{'MB':>9}{'bytes/token':>13}{'padding':>9}"]
    rows = [(name, split, source[split]) for name, source in summary["sources"].items() for split in SPLITS]
    rows += [("total", split, {"padding": 0, **summary["totals"][split]}) for split in SPLITS]
    for name, split, facts in rows:
        per_token = facts["bytes"] / facts["tokens"] if facts["tokens"] else 0
        padding = facts["padding"] / facts["tokens"] if facts["tokens"] else 0
        lines.append(
            f"{name:12}{split:7}{facts['documents']:>11,}{facts['tokens']:>13,}{facts['bytes'] / 1e6:>9.2f}"
            f"{per_token:>13.2f}{padding:>9.2%}"
        )
    lines.append("")
    for name, source in summary["sources"].items():
        for reason, count in source["dropped"].items():
            lines.append(f"left out of {name}: {count['documents']:,} {reason} ({count['bytes'] / 1e6:.2f} MB)")
        if source["texts_cut_into_rows"]:
            lines.append(f"cut into rows in {name}: {source['texts_cut_into_rows']:,} texts longer than a row")
        if not source["val"]["documents"]:
            lines.append(f"warning: nothing is held out of {name}; more documents or a larger validation_fraction help")
    return "\n".join(lines)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line of the preparation."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.run",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", type=Path, help="YAML file, see configs/data/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="change a value of the config")
    parser.add_argument("--out", help="folder of the data set (default: `out` of the config)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="processes (default: one for each core)")
    arguments = parser.parse_intermixed_args(argv)  # options and key=value in any order
    overrides = [*arguments.overrides, *([f"out={arguments.out}"] if arguments.out else [])]
    if arguments.workers < 1:
        raise UserError(f"--workers is {arguments.workers}; it must be at least 1")
    if importlib.util.find_spec("zstandard") is None:
        raise UserError("data_prep needs the package zstandard: pip install 'mobilemoe-train[data]'")
    start = time.monotonic()
    config = load(arguments.config, overrides)
    try:
        summary = prepare(config, arguments.workers)
    except OSError as error:
        raise UserError(f"cannot prepare {config.out}: {error.filename or ''}: {error.strerror or error}") from None
    except BrokenProcessPool:
        raise UserError(
            f"a worker process was killed, perhaps for want of memory: try fewer than --workers {arguments.workers}; "
            "the same command continues"
        ) from None
    print(describe(summary))
    print(f"\n{config.out}: vocabulary {summary['vocab_size']:,}, {time.monotonic() - start:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
