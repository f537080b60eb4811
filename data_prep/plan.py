"""What a preparation has to do: the parts of each source, under keys that change with input and configuration."""

import hashlib
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from data_prep import benchmarks
from data_prep.choose import choose, find_duplicates
from data_prep.collect import VERSION, Report, Spool, read_report
from data_prep.config import DataConfig, SourceConfig
from data_prep.encode import Chosen, Job
from data_prep.fast_tokenizer import Engine
from data_prep.render import Frame
from data_prep.sources import Input, find_input
from mm_train.cli import UserError
from mm_train.files import write_atomic
from mm_train.tokenizer import Tokenizer

SPLITS = ("train", "val")


@dataclass(frozen=True)
class SourcePlan:
    """One source: its input, and the folder with all that is made of it before it is published."""

    name: str
    config: SourceConfig
    input: Input
    fraction: float  # held out
    key: str
    folder: Path

    @property
    def parts(self) -> list[Path]:
        """Where `collect` writes each part."""
        return [self.folder / f"read-{number:05d}" for number in range(len(self.input.parts))]

    @property
    def duplicates_file(self) -> Path:
        return self.folder / "duplicates.npy"

    def write_duplicates(self) -> None:
        """Find the duplicates among all parts."""
        near = self.config.near_duplicate if self.config.dedup == "minhash" else None
        kinds = np.concatenate(find_duplicates(self.parts, near))
        if self.config.dedup == "none":
            kinds[:] = 0
        unfinished = self.folder / "duplicates.tmp.npy"
        np.save(unfinished, kinds)
        write_atomic(self.duplicates_file, unfinished.read_bytes())
        unfinished.unlink()

    @cached_property
    def _choice(self) -> tuple[dict[str, list[Chosen]], Report]:
        report = Report()
        for part in self.parts:
            report.add(read_report(part))
        indexes = [np.load(part / "index.npy") for part in self.parts]
        borders = np.cumsum([0, *map(len, indexes)])
        duplicates = np.load(self.duplicates_file)
        sizes = [part.size for part in self.input.parts]
        limit, train = self.config.max_bytes, []
        for number, index in enumerate(indexes):
            # Each part is allowed its share of the limit, so that it can be decided on by itself.
            some = limit if limit is None or len(sizes) == 1 else limit * sizes[number] // sum(sizes)
            kinds = duplicates[borders[number] : borders[number + 1]]
            train.append(choose(index, kinds, False, self.fraction, some, report))
        held_out = choose(
            np.concatenate(indexes), duplicates, True, self.fraction, self.config.max_validation_bytes, report
        )
        val = [held_out[(held_out >= low) & (held_out < high)] - low for low, high in itertools.pairwise(borders)]
        chosen = {"train": train, "val": val}
        return {
            split: [
                Chosen(part, numbers, int(index["bytes"][numbers].sum()))
                for part, numbers, index in zip(self.parts, chosen[split], indexes, strict=True)
            ]
            for split in SPLITS
        }, report

    def chosen(self, split: str) -> list[Chosen]:
        """The documents of a split, part by part. Raises UserError when none is left to train on."""
        by_split, report = self._choice
        count = {name: sum(len(some.numbers) for some in by_split[name]) for name in SPLITS}
        if not count["train"]:
            reasons = ", ".join(f"{name}: {number}" for name, (number, _) in sorted(report.dropped.items()))
            raise UserError(
                f"source {self.name} is empty: no document is left to train on (dropped {reasons or 'none found'}; "
                f"held out: {count['val']})"
            )
        return by_split[split]

    @property
    def report(self) -> Report:
        """What was left out before tokenising."""
        return self._choice[1]

    @cached_property
    def has_conversations(self) -> bool:
        """Whether there are any: of these, not every token is trained on."""
        return any(bool(np.load(part / "index.npy")["chat"].any()) for part in self.parts)

    def sample(self, max_bytes: int) -> Iterator[str]:
        """Training text for the tokenizer to learn from."""
        for some in self.chosen("train"):
            spool = Spool(some.spool)
            for number in some.numbers.tolist():
                document = spool[number]
                max_bytes -= document.num_bytes
                if max_bytes < 0:
                    return
                yield from document.parts

    @property
    def provenance(self) -> dict[str, str | None]:
        """Where the text is from, and the hash of the configuration that it went through."""
        return {"revision": self.input.commit or self.config.revision, "config_sha256": self.key}

    def shard_key(self, tokenizer: Tokenizer, shard_tokens: int) -> str:
        """Identifies the shards of this source."""
        return digest(self.key, tokenizer.sha256, shard_tokens)

    def jobs(self, split: str, tokenizer: Tokenizer, engine: Engine, frame: Frame, shard_tokens: int) -> list[Job]:
        """The encoding of a split: a job for each part of the training text, one for all that is held out."""
        source = self.config
        facts: dict[str, Any] = {
            "tokenizer_sha256": tokenizer.sha256,
            "vocab_size": tokenizer.vocab_size,
            "licence": source.licence,
            "domain": source.domain,
            "layout": source.layout,
            "row_length": source.row_length,
            "has_mask": source.layout == "packed" or self.has_conversations,
            **self.provenance,
        }
        chosen = self.chosen(split)
        groups = [[some] for some in chosen] if split == "train" else [chosen]
        folder = self.folder / f"shards-{self.shard_key(tokenizer, shard_tokens)[:16]}"
        return [
            Job(
                folder=folder / f"{split}-{number:05d}",
                source=self.name,
                split=split,
                chosen=group,
                engine=engine,
                frame=frame,
                row_length=source.row_length,
                shard_tokens=shard_tokens,
                number=None if len(groups) == 1 else number,
                facts=facts,
            )
            for number, group in enumerate(groups)
        ]


def make_plans(config: DataConfig, work: Path) -> list[SourcePlan]:
    """The plan of every source. Raises UserError for input that is missing or cannot be read."""
    items = benchmarks.identity(config.benchmarks)
    plans = []
    for name, source in config.sources.items():
        found = find_input(name, source, config.part_bytes)
        facts = {field: value for field, value in asdict(source).items() if field != "weight"}
        compared = items if source.decontaminate else ""
        key = digest(VERSION, facts, config.validation_fraction, config.part_bytes, found.identity, compared)
        plans.append(SourcePlan(name, source, found, config.validation_fraction, key, work / f"{name}-{key[:16]}"))
    return plans


def digest(*parts: Any) -> str:
    """A hash of JSON values."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
