"""The preparation of a data set, step by step: read, tell duplicates, choose a tokenizer, encode, publish.

Every step is made of tasks whose outcome is a folder or file that appears whole or not at all, so that work goes on
where it stopped. Several ranks share a preparation by each doing every n-th task; the outcome is the same.
"""

import contextlib
import fcntl
import json
import shutil
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import IO, Any, TypeVar

from tqdm import tqdm

from data_prep import benchmarks
from data_prep.baselines import baselines
from data_prep.collect import collect
from data_prep.config import DataConfig, TokenizerConfig
from data_prep.coverage import coverage
from data_prep.encode import Job, encode
from data_prep.fast_tokenizer import choose_engine, reference
from data_prep.plan import SPLITS, SourcePlan, digest, make_plans
from data_prep.publish import finished, join
from data_prep.render import Frame
from data_prep.train_bpe import train_bpe
from data_prep.workers import Pool, processes
from mm_train.cli import UserError
from mm_train.files import publish, write_atomic
from mm_train.manifest import Manifest
from mm_train.shards import ShardReader
from mm_train.tokenizer import Tokenizer, load_tokenizer

POLL_SECONDS = 2.0
LOCK_SECONDS = 2.0  # for workers of a preparation that was killed to end: they hold its lock too
T = TypeVar("T")


class NotYet(UserError):
    """Another rank has not done its part: no mistake, and worth another try."""

    status = 75  # sysexits.h EX_TEMPFAIL, as for a training that was asked to stop


@dataclass(frozen=True)
class Share:
    """Which of all tasks this process does, and how long it waits for those of others."""

    rank: int = 0
    world: int = 1
    wait_seconds: float = 0.0

    def mine(self, tasks: Sequence[T]) -> Sequence[T]:
        """Every `world`-th task."""
        return tasks[self.rank :: self.world]

    def wait(self, step: str, files: Sequence[Path]) -> None:
        """Return once all `files` exist. Raises NotYet when they do not within the time allowed."""
        deadline = time.monotonic() + self.wait_seconds
        while missing := [file for file in files if not file.exists()]:
            if time.monotonic() >= deadline:
                raise NotYet(
                    f"rank {self.rank} of {self.world} has done its part of the step '{step}'; {len(missing)} of "
                    f"{len(files)} tasks of others are missing: run all ranks again when they have ended"
                )
            time.sleep(min(POLL_SECONDS, max(0.0, deadline - time.monotonic())))


def prepare(config: DataConfig, workers: int, share: Share = Share()) -> dict[str, Any] | None:
    """Bring the data set of `config` into being; returns the content of its dataset.json.

    None from a rank that has done its part and leaves the end to rank 0. Raises UserError for bad input, NotYet when
    others have to be waited for, and OSError where the output cannot be written.
    """
    out = Path(config.out)
    work = out / ".work"
    plans = make_plans(config, work)
    key = digest([plan.key for plan in plans], asdict(config.tokenizer), config.shard_tokens, _weights(config))
    summary = _read_finished(out, key)
    if summary:
        print(f"{out} is up to date")
        return summary
    try:
        return _prepare(config, plans, key, workers, share)
    except (NotYet, OSError):
        # A rank without tasks of its own may still be waiting, or reading, when rank 0 has finished and cleaned up.
        if share.rank and _read_finished(out, key):
            return None
        raise


def _prepare(
    config: DataConfig, plans: list[SourcePlan], key: str, workers: int, share: Share
) -> dict[str, Any] | None:
    out = Path(config.out)
    with _work_folder(out, share) as work:
        index = _benchmark_index(config, work)
        _read_all(plans, index, workers, share)
        for plan in share.mine(plans):
            if not plan.duplicates_file.exists():
                plan.write_duplicates()
        share.wait("duplicates", [plan.duplicates_file for plan in plans])
        tokenizer, folder = _tokenizer(config.tokenizer, plans, work, share)
        truth = reference(tokenizer, folder)
        with processes(workers, forked=True) as pool:
            engine, how = choose_engine(tokenizer, folder, truth, pool.call)
            print(how, flush=True)
            frame = Frame.of(tokenizer, truth[1])
            jobs = {
                (plan.name, split): plan.jobs(split, tokenizer, engine, frame, config.shard_tokens)
                for plan in plans
                for split in SPLITS
                if not _is_published(out, plan, split, plan.shard_key(tokenizer, config.shard_tokens))
            }
            _encode_all([job for some in jobs.values() for job in some], pool, share)
        if share.rank:
            return None
        summary = _publish(config, plans, jobs, tokenizer, key, index)
    shutil.rmtree(work)
    return summary


@contextlib.contextmanager
def _work_folder(out: Path, share: Share) -> Iterator[Path]:
    """OUT/.work for what is needed to continue, locked: two preparations at once would mix their work.

    Ranks share the folder, and each has a lock of its own.
    """
    work = out / ".work"
    work.mkdir(parents=True, exist_ok=True)
    alone = share.world == 1
    with (work / "lock").open("w") as lock, (work / f"lock-{share.rank}").open("w") as own:
        if not (_lock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH) and _lock(own, fcntl.LOCK_EX)):
            raise UserError(
                f"another preparation is writing to {out}: wait for it or choose another --out"
                + ("" if alone else " (each rank may run once)")
            )
        for unfinished in work.rglob("*.tmp") if alone else ():
            if unfinished.is_dir():
                shutil.rmtree(unfinished)
        yield work


def _lock(file: IO[str], kind: int) -> bool:
    """Take a lock, unless others have it for longer than LOCK_SECONDS."""
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, kind | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(0.05)


def _benchmark_index(config: DataConfig, work: Path) -> Path | None:
    """The index of the items that text is compared with, made if need be; None when there are none."""
    identity = benchmarks.identity(config.benchmarks)
    if not identity:
        return None
    folder = work / f"benchmarks-{identity[:16]}"
    if not folder.is_dir():
        with _unfinished(folder) as unfinished:
            print("indexing the benchmarks' items", flush=True)
            benchmarks.build(config.benchmarks, unfinished)
    return folder


@contextlib.contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """A folder that takes the name `folder` at the end, unless another rank was first."""
    temporary = folder.with_name(f"{folder.name}.{time.time_ns()}.tmp")
    temporary.mkdir(parents=True)
    yield temporary
    try:
        publish(temporary, folder)
    except OSError:
        if not folder.is_dir():
            raise
        shutil.rmtree(temporary)


def _read_all(plans: list[SourcePlan], index: Path | None, workers: int, share: Share) -> None:
    """Read the parts of all sources side by side."""
    parts = [(plan, part, folder) for plan in plans for part, folder in zip(plan.input.parts, plan.parts, strict=True)]
    missing = [(plan, part, folder) for plan, part, folder in share.mine(parts) if not folder.is_dir()]
    tasks = [(collect, (plan.config, part, index, folder)) for plan, part, folder in missing]
    with processes(workers) as pool:
        pool.run("read", tasks, sum(part.size for _, part, _ in missing))
    share.wait("read", [folder for _, _, folder in parts])


def _tokenizer(config: TokenizerConfig, plans: list[SourcePlan], work: Path, share: Share) -> tuple[Tokenizer, Path]:
    """The tokenizer and the folder it is saved in. Rank 0 makes it."""
    folder = work / f"tokenizer-{digest(asdict(config), [plan.key for plan in plans])[:16]}"
    if not share.rank:
        for plan in plans:
            plan.chosen("train")  # an empty source is to be seen now
        if config.kind == "folder":
            tokenizer = load_tokenizer(str(config.path))
        elif config.kind == "llama3":
            tokenizer = load_tokenizer("llama3")
        elif not folder.is_dir():
            texts = (text for plan in plans for text in plan.sample(config.sample_bytes))
            tokenizer = train_bpe(texts, config.vocab_size)
        else:
            tokenizer = load_tokenizer(folder)
        if not folder.is_dir() or sha256((folder / "tokenizer.json").read_bytes()).hexdigest() != tokenizer.sha256:
            shutil.rmtree(folder, ignore_errors=True)
            with _unfinished(folder) as unfinished:
                tokenizer.save(unfinished)
        return tokenizer, folder
    share.wait("tokenizer", [folder])
    return load_tokenizer(folder), folder


def _is_published(out: Path, plan: SourcePlan, split: str, key: str) -> bool:
    with contextlib.suppress(UserError):
        return ShardReader(out / plan.name / split).manifest.extra.get("key") == key
    return False


def _encode_all(jobs: list[Job], pool: Pool, share: Share) -> None:
    """Encode what is missing, side by side."""
    done = [job.folder / "done.json" for job in jobs]
    missing = [job for job in share.mine(jobs) if not (job.folder / "done.json").is_file()]
    pool.run("encode", [(encode, (job,)) for job in missing], sum(job.num_bytes for job in missing))
    if not share.rank:
        share.wait("encode", done)


def _publish(
    config: DataConfig,
    plans: list[SourcePlan],
    jobs: dict[tuple[str, str], list[Job]],
    tokenizer: Tokenizer,
    key: str,
    index: Path | None,
) -> dict[str, Any]:
    """Put the shards in their place, and say what they are in dataset.json, which comes last."""
    out = Path(config.out)
    (out / "dataset.json").unlink(missing_ok=True)
    tokenizer.save(out)
    sources = {}
    for plan in plans:
        shard_key = plan.shard_key(tokenizer, config.shard_tokens)
        manifests = {}
        for split in SPLITS:
            if (plan.name, split) in jobs:
                some = jobs[plan.name, split]
                extra = {"key": shard_key, **_fit(some)}
                manifests[split] = join(some, some[0].folder.parent / "joined", out, extra)
            else:
                manifests[split] = ShardReader(out / plan.name / split).manifest
        sources[plan.name] = _summarise(plan, manifests)
        _write_contamination(plan, out)
    scores = {plan.name: baselines(out / plan.name, tokenizer) for plan in tqdm(plans, "baselines", disable=None)}
    write_atomic(out / "baselines.json", _json(scores))
    summary = {
        "key": key,
        "tokenizer_sha256": tokenizer.sha256,
        "vocab_size": tokenizer.vocab_size,
        "benchmarks": coverage(index),
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
    return summary


def _fit(jobs: list[Job]) -> dict[str, Any]:
    """What packing did to documents longer than a row, over all jobs."""
    if jobs[0].row_length is None:
        return {}
    progress = [finished(job) for job in jobs]
    dropped = [sum(some.dropped[unit] for some in progress) for unit in range(2)]
    return {"cut": sum(some.cut for some in progress), "dropped": dropped}


def _summarise(plan: SourcePlan, manifests: dict[str, Manifest]) -> dict[str, Any]:
    source, report = plan.config, plan.report
    dropped = dict(report.dropped)
    too_long = [manifest.extra["dropped"] for manifest in manifests.values() if "dropped" in manifest.extra]
    if any(documents for documents, _ in too_long):
        dropped["longer than a row"] = list(map(sum, zip(*too_long, strict=True)))
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
        "weight": source.weight,
        "origin": source.path or source.kind,
        **plan.provenance,
        "layout": source.layout,
        "row_length": source.row_length,
        **splits,
        "texts_cut_into_rows": sum(manifest.extra.get("cut", 0) for manifest in manifests.values()),
        "dropped": {
            reason: {"documents": count[0], "bytes": count[1], "examples": report.examples.get(reason, [])}
            for reason, count in sorted(dropped.items())
        },
    }


def _write_contamination(plan: SourcePlan, out: Path) -> None:
    """OUT/SOURCE/contamination.jsonl: the documents that were left out for a benchmark's sake, and what they share."""
    file = out / plan.name / "contamination.jsonl"
    if plan.report.contaminated:
        lines = "".join(json.dumps(found, ensure_ascii=False) + "\n" for found in plan.report.contaminated)
        write_atomic(file, lines.encode())
    else:
        file.unlink(missing_ok=True)


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


def _weights(config: DataConfig) -> dict[str, float]:
    return {name: source.weight for name, source in config.sources.items()}


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
