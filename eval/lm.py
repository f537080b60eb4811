"""Answers a benchmark's requests with a model: shared among ranks, kept in a log, never computed twice."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

from tqdm import tqdm

from eval.item_log import Answer, ItemLog, Used, add_used
from eval.packed import Likelihood, PackedEngine, Work
from eval.ranks import Ranks
from eval.sequences import Codec, Prompt, Request, Scored, encode
from eval.tries import order_key
from mm_train.tokenizer import Tokenizer


class Engine(Protocol):
    """What a model is asked for. Answers come batch by batch, by number of the sequence."""

    context: int
    work: Work

    @property
    def codec(self) -> Codec:
        """Its tokenizer."""

    def score(self, sequences: Sequence[Scored]) -> Iterator[dict[int, Likelihood]]:
        """Log-likelihoods."""

    def write(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, str]]:
        """Continuations."""


class OwnCodec:
    """This project's tokenizer: BOS, then the text."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.eos_text = tokenizer.decode([tokenizer.eos_id], skip_special=False)
        self.stop_ids: tuple[int, ...] = tokenizer.stop_ids
        self.sha256 = tokenizer.sha256
        self.first = [tokenizer.bos_id]

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, after BOS."""
        return [[self.tokenizer.bos_id, *ids] for ids in self.tokenizer.encode_batch(texts)]

    def encode_alone(self, text: str) -> list[int]:
        """Ids of a text without BOS."""
        return self.tokenizer.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, control tokens left out."""
        return self.tokenizer.decode(ids)


@dataclass(frozen=True)
class Answers:
    """Answers in the order of the requests; how many were cut to the context, or may write less than asked."""

    answers: list[Answer]
    num_cut: int
    num_shortened: int


class LM:
    """A model with all that is kept about it."""

    def __init__(self, engine: Engine, log: ItemLog | None = None, ranks: Ranks | None = None) -> None:
        self.engine, self.log, self.ranks = engine, log, ranks
        self.kept: dict[str, Answer] = {}
        self.asked: dict[str, int] = {}  # unequal requests, by benchmark
        self._used: dict[str, Used] = dict(log.used) if log else {}  # of earlier processes
        self._newly_used: dict[str, Used] = {}
        # A file system may show one rank what another one does not see yet.
        for answers in self._gather(log.answers if log else {}):
            self.kept |= answers

    def answer(self, requests: Sequence[tuple[int, Request]], desc: str = "requests") -> Answers:
        """Requests with the number of their document. All ranks pass the same and get all answers.

        `desc`, the name of the benchmark, is the label of the progress bar. Raises ValueError for a request with
        nothing to score.
        """
        items = encode(requests, self.engine.codec, self.engine.context)
        keys = [item.key for item in items]
        self.asked[desc] = len(set(keys))
        todo = {key: item for key, item in zip(keys, items, strict=True) if key not in self.kept}
        new = self._compute(self._mine(todo), desc)
        for others in self._gather(new):
            self.kept |= others
        return Answers(
            [self.kept[key] for key in keys],
            sum(item.cut for item in items),
            sum(isinstance(item, Prompt) and item.shortened for item in items),
        )

    def used(self) -> dict[str, Used]:
        """Which experts the answers used, by benchmark, those of earlier processes included as far as the log tells.

        All ranks have to call it. Empty for an engine that does not count.
        """
        total = dict(self._used)
        for used in [self._newly_used] if self.ranks is None else self.ranks.gather(self._newly_used):
            add_used(total, used)
        return total

    def _gather(self, answers: dict[str, Answer]) -> list[dict[str, Answer]]:
        return [answers] if self.ranks is None else self.ranks.gather(answers)

    def _mine(self, todo: dict[str, Any]) -> dict[str, Any]:
        """This rank's share: whole documents, in an order that keeps those together which begin alike, so many that
        every rank gets about as many tokens."""
        if self.ranks is None or self.ranks.world == 1:
            return todo
        groups: dict[int, list[str]] = {}
        for key, item in todo.items():
            groups.setdefault(item.group, []).append(key)
        ordered = sorted(groups.values(), key=lambda keys: order_key(todo[keys[0]].inputs))
        ends = list(accumulate(sum(len(todo[key].ids) for key in keys) for keys in ordered))
        share = (ends[-1] if ends else 0) / self.ranks.world
        return {
            key: todo[key]
            for keys, end in zip(ordered, ends, strict=True)
            if min(int((end - 1) / share), self.ranks.world - 1) == self.ranks.rank
            for key in keys
        }

    def _compute(self, todo: dict[str, Any], desc: str) -> dict[str, Answer]:
        new: dict[str, Answer] = {}
        quiet = True if self.ranks is not None and not self.ranks.is_main else None  # None: on a terminal only
        with tqdm(total=len(todo), desc=desc, unit="request", disable=quiet) as bar:
            for kind, run in ((Scored, self.engine.score), (Prompt, self.engine.write)):
                keys = [key for key, item in todo.items() if isinstance(item, kind)]
                for batch in run([todo[key] for key in keys]):
                    answers: dict[str, Answer] = {keys[number]: answer for number, answer in batch.items()}
                    counts = self.engine.counted() if isinstance(self.engine, PackedEngine) else None
                    used = {} if counts is None else {desc: Used(len(answers), counts)}
                    add_used(self._newly_used, used)
                    if self.log is not None:
                        self.log.add(answers, used)
                    new |= answers
                    bar.update(len(answers))
        return new
