"""The engine for this project's models: rows that are tries, shared prefixes, the head only where something is scored.

Batches are made of rows of like length; those to be scored hold at most `batch_tokens` tokens. Experts take what the
router sends them (dropless: nothing is dropped outside of training), so an answer does not depend on what else is in
its batch.

Shapes: B rows, T columns of a row, N scored positions, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from eval.expert_counts import ExpertCounts
from eval.sequences import Codec, Prompt, Scored, finish
from eval.tries import Row, chain, cluster, pack
from mm_train.decode import generate
from mm_train.kv_cache import Columns, KVCache
from mm_train.model import MobileMoE

HEAD_ELEMENTS = 2**26  # logits held at once, 256 MiB in float32
# A batch of prompts may have more tokens, because nearly all of its steps are of one token a row: so many times
# `batch_tokens` at first, and so many in its key-value cache.
PROMPT_FACTOR, CACHE_FACTOR = 4, 8

Likelihood = tuple[float, bool]  # nats, and whether greedy decoding gives exactly this


@dataclass
class Work:
    """What an engine has done."""

    tokens: int = 0  # through the model, padding not counted
    padding: int = 0


class PackedRows(KVCache):
    """What attention needs to see tries instead of sequences. Keeps no keys and values but those of the prefix."""

    def __init__(self, prefix: KVCache | None, positions_BT: Tensor, mask_BTS: Tensor | None) -> None:
        self.prefix, self.positions_BT, self.mask_BTS = prefix, positions_BT, mask_BTS

    def append(self, layer: int, k_BGTC: Tensor, v_BGTC: Tensor) -> Columns:
        """All that the new columns can see: their own, and the prefix's, the same for every row."""
        return Columns(k_BGTC, v_BGTC, None if self.prefix is None else self.prefix.filled(layer))

    def positions(self, columns: int, device: torch.device) -> Tensor:
        """Depths in the trie."""
        return self.positions_BT

    def mask(self, columns: int, device: torch.device) -> Tensor | None:
        """Ancestors, 0 or -inf."""
        return self.mask_BTS

    def advance(self, columns: int) -> None:
        """Nothing is kept."""


class PackedEngine:
    """Answers by a MobileMoE model."""

    def __init__(self, model: MobileMoE, codec: Codec, batch_tokens: int) -> None:
        """`batch_tokens`: most tokens in a batch, padding included (one row is always taken)."""
        self.model, self.codec, self.batch_tokens = model, codec, batch_tokens
        self.device = model.model.embed_tokens.weight.device
        self.context = model.config.max_position_embeddings
        self.work = Work()
        self._counts: ExpertCounts | None = None
        self._counted: list[np.ndarray] = []  # a batch each

    def count_experts(self) -> None:
        """From now on, count which experts are chosen (a dense network has none)."""
        if self.model.moe_layers():
            self._counts = ExpertCounts(self.model)

    def counted(self) -> np.ndarray | None:
        """The counts of the batches answered since the last call, [2, L, E] (eval.expert_counts); None when off."""
        counted, self._counted = self._counted, []
        return np.sum(counted, axis=0) if counted else None

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> Iterator[dict[int, Likelihood]]:
        """Answers by number of the sequence, batch by batch."""
        groups: dict[int, list[tuple[int, Scored]]] = {}
        for number, sequence in enumerate(sequences):
            groups.setdefault(sequence.group, []).append((number, sequence))
        rows = [row for group in groups.values() for row in pack(group)]
        for indices, prefix in cluster(rows):
            cache = self._prefix(rows[indices[0]].ids[:prefix])
            indices.sort(key=lambda index: len(rows[index]), reverse=True)  # memory trouble shows at once
            before = self._taken()
            start = 0
            while start < len(indices):
                size = max(1, self.batch_tokens // (len(rows[indices[start]]) - prefix))
                batch = [rows[index] for index in indices[start:][:size]]
                answers = self._score(batch, cache, prefix)
                self._keep(len(batch), before)
                yield answers
                start += size

    def _prefix(self, ids: np.ndarray) -> KVCache | None:
        """Keys and values of what several rows begin with."""
        if not len(ids):
            return None
        cache = self.model.new_cache(1, len(ids))
        tokens_BT = torch.from_numpy(ids)[None].to(self.device)
        if self._counts is not None:
            self._counts.expect(torch.ones_like(tokens_BT), torch.zeros_like(tokens_BT))
        self.model.hidden(tokens_BT, cache)
        self.work.tokens += len(ids)
        return cache

    def _taken(self) -> np.ndarray | None:
        return None if self._counts is None else self._counts.take()

    def _keep(self, rows: int, prefix: np.ndarray | None) -> None:
        """Keep what the batch that has just been answered adds: its own tokens, and for each row the shared prefix."""
        own = self._taken()
        if own is not None and prefix is not None:
            self._counted.append(own + rows * prefix)

    def _score(self, batch: list[Row], prefix: KVCache | None, length: int) -> dict[int, Likelihood]:
        """Run one batch, longest row first."""
        width = len(batch[0]) - length
        tokens_BT, depth_BT = (np.zeros((len(batch), width), dtype=np.int64) for _ in range(2))
        last_BT = np.full((len(batch), width), width - 1)
        rows, nodes = [], []
        for index, row in enumerate(batch):
            own = len(row) - length
            tokens_BT[index, :own], depth_BT[index, :own] = row.ids[length:], row.depth[length:]
            last_BT[index, :own] = row.last[length:] - length
            for path in row.paths:
                rows.append(np.full(len(path.nodes), index))
                nodes.append(path.nodes - length)
        used = sum(len(row) - length for row in batch)
        self.work.tokens += used
        self.work.padding += tokens_BT.size - used
        plain = prefix is None and all((row.last == len(row) - 1).all() for row in batch)
        tokens, depth, last = (torch.from_numpy(a).to(self.device) for a in (tokens_BT, depth_BT, last_BT))
        where = [torch.from_numpy(np.concatenate(parts)).to(self.device) for parts in (rows, nodes)]
        if self._counts is not None:
            own_B1 = torch.tensor([len(row) - length for row in batch], device=self.device)[:, None]
            scored_BT = torch.zeros_like(tokens)
            scored_BT[where[0], where[1]] = 1
            self._counts.expect(torch.arange(width, device=self.device) < own_B1, scored_BT)
        if plain:  # padding on the right needs no mask: the model is causal
            hidden_BTD = self.model.hidden(tokens)
        else:
            seen = PackedRows(prefix, depth, self._mask(last))
            hidden_BTD = self.model.hidden(tokens, seen)
        paths = [path for row in batch for path in row.paths]
        targets = torch.from_numpy(np.concatenate([path.targets for path in paths])).long().to(self.device)
        logprob_N, greedy_N = self._head(hidden_BTD[where[0], where[1]], targets)
        sizes = [len(path.targets) for path in paths]
        return {
            path.number: (float(logprob.sum()), bool(greedy.all()))
            for path, logprob, greedy in zip(paths, logprob_N.split(sizes), greedy_N.split(sizes), strict=True)
        }

    def _mask(self, last_BT: Tensor) -> Tensor:
        """[B, T, T], 0 where a token may look: its ancestors and itself."""
        column_T = torch.arange(last_BT.shape[1], device=self.device)
        seen_BTT = (column_T[:, None] >= column_T) & (column_T[:, None] <= last_BT[:, None, :])
        zero = torch.zeros((), dtype=self.model.compute_dtype, device=self.device)
        return zero.where(seen_BTT, -torch.inf)

    def _head(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target (float64, on the CPU), and whether it is the most probable token."""
        size = max(1, HEAD_ELEMENTS // self.model.config.vocab_size)
        logprobs, greedy = [], []
        for hidden, target in zip(hidden_ND.split(size), target_N.split(size), strict=True):
            logits = self.model.logits(hidden).float()
            logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == target)
        return torch.cat(logprobs).double().cpu(), torch.cat(greedy).cpu()

    def write(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, str]]:
        """Texts by number of the prompt, batch by batch."""
        rows = [chain(number, prompt) for number, prompt in enumerate(prompts)]
        for indices, prefix in cluster(rows):
            with torch.inference_mode():
                cache = self._prefix(rows[indices[0]].ids[:prefix])
                before = self._taken()
            # Those that may write long together: a batch lasts as long as its longest answer.
            indices.sort(key=lambda index: (prompts[index].max_new, len(rows[index])), reverse=True)
            start = 0
            while start < len(indices):
                length = max(len(rows[index]) for index in indices[start:])
                room = CACHE_FACTOR * self.batch_tokens // (length - prefix + prompts[indices[start]].max_new)
                size = max(1, min(PROMPT_FACTOR * self.batch_tokens // (length - prefix), room))
                numbers = indices[start:][:size]
                answers = self._write(numbers, prompts, cache)
                self._keep(len(numbers), before)
                yield answers
                start += size

    def _write(self, numbers: list[int], prompts: Sequence[Prompt], prefix: KVCache | None) -> dict[int, str]:
        batch = [prompts[number] for number in numbers]
        written: list[list[int]] = [[] for _ in batch]
        # Every token is at least a byte of text, so a stop lies within so many tokens.
        reach = [max(len(stop.encode()) for stop in prompt.stops) + 1 for prompt in batch]

        def ended(row: int, token: int) -> bool:
            written[row].append(token)
            tail = self.codec.decode(written[row][-reach[row] :])
            return len(written[row]) >= batch[row].max_new or any(stop in tail for stop in batch[row].stops)

        ids = [prompt.ids.tolist() for prompt in batch]
        longest = max(prompt.max_new for prompt in batch)
        shared = prefix.length if prefix else 0
        if self._counts is not None:
            width = max(len(row) for row in ids) - shared
            own_B1 = torch.tensor([len(row) - shared for row in ids], device=self.device)[:, None]
            column_T = torch.arange(width, device=self.device)
            last_BT = (column_T == width - 1).expand(len(ids), -1)
            self._counts.expect(column_T >= width - own_B1, last_BT)  # prompts are padded on the left
        for _ in generate(self.model, ids, longest, stop_ids=self.codec.stop_ids, prefix=prefix, ended=ended):
            pass
        self.work.tokens += sum(len(row) - shared for row in ids) + sum(max(0, len(text) - 1) for text in written)
        texts = (finish(self.codec.decode(text), prompt.stops) for text, prompt in zip(written, batch, strict=True))
        return dict(zip(numbers, texts, strict=True))
