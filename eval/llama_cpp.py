"""The engine for GGUF files: benchmarks answered by llama.cpp, as a device answers.

llama.cpp says what follows a prompt, one position at a time, and keeps what a prompt shares with the one before it. So
the sequences of a document are taken apart into what is asked after each of their beginnings, and these are walked
depth first: every token of the trie is computed about once, and where choices part, one question is for all of them.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from eval.packed import Likelihood, Work
from eval.sequences import Codec, Prompt, Scored, finish
from eval.tries import common, order_key
from mm_train.gguf.runtime import LlamaCpp


class LlamaCppEngine:
    """Answers by a model in llama.cpp."""

    def __init__(self, model: LlamaCpp, codec: Codec) -> None:
        self.model, self.codec = model, codec
        self.context = model.room
        self.work = Work()
        self._cached = np.zeros(0, np.int32)  # tokens that llama.cpp has seen last

    def score(self, sequences: Sequence[Scored]) -> Iterator[dict[int, Likelihood]]:
        """Log-likelihoods by number of the sequence, document by document; those that begin alike follow each other."""
        groups: dict[int, list[int]] = {}
        for number, sequence in enumerate(sequences):
            groups.setdefault(sequence.group, []).append(number)
        for numbers in sorted(groups.values(), key=lambda group: order_key(sequences[group[0]].inputs)):
            yield self._score({number: sequences[number] for number in numbers})

    def _score(self, document: dict[int, Scored]) -> dict[int, Likelihood]:
        wanted: dict[bytes, tuple[np.ndarray, dict[int, None]]] = {}
        for sequence in document.values():
            for beginning, target in _steps(sequence):
                wanted.setdefault(order_key(beginning), (beginning, {}))[1][target] = None
        said = {}
        for key in sorted(wanted):  # depth first: a beginning comes before what goes on from it
            beginning, targets = wanted[key]
            self._count(beginning)
            said[key] = self.model.likelihoods(beginning.tolist(), targets)
        answers = {}
        for number, sequence in document.items():
            steps = [(said[order_key(beginning)], target) for beginning, target in _steps(sequence)]
            nats = sum(log_probs[target] for (log_probs, _), target in steps)
            answers[number] = (nats, all(best == target for (_, best), target in steps))
        return answers

    def write(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, str]]:
        """Texts by number of the prompt, one at a time; those that begin alike follow each other."""
        for number in sorted(range(len(prompts)), key=lambda number: order_key(prompts[number].ids)):
            prompt = prompts[number]
            self._count(prompt.ids)
            text, size = self.model.write(prompt.ids.tolist(), prompt.max_new, prompt.stops)
            self.work.tokens += max(0, size - 1)  # the last one is not read again
            yield {number: finish(text, prompt.stops)}

    def _count(self, ids: np.ndarray) -> None:
        """Count what llama.cpp has to compute: all but what it has seen, and the last token always."""
        self.work.tokens += len(ids) - min(common(self._cached, ids), len(ids) - 1)
        self._cached = ids


def _steps(sequence: Scored) -> Iterator[tuple[np.ndarray, int]]:
    """(what is read, what is asked for next) of a sequence."""
    for position in range(len(sequence.ids) - sequence.num_targets, len(sequence.ids)):
        yield sequence.ids[:position], int(sequence.ids[position])
