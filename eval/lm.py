"""Scores text with a language model: what lm-eval asks of one, without its memory bill.

Rows of a batch are of like length and share a budget of tokens; the head runs only where a continuation is predicted,
so a batch never holds logits for a whole prompt. Right padding needs no mask, because the model is causal.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from mm_train.tokenizer import Tokenizer

ENCODE_CHUNK = 1024  # requests encoded at once: bounds the memory of Python's lists of ids
HEAD_ELEMENTS = 2**26  # logits held at once, 256 MiB in float32


class ModelConfig(Protocol):
    """What is read of a model's configuration."""

    max_position_embeddings: int


class Model(Protocol):
    """What is asked of a model: causal, and independent of what else is in the batch."""

    @property
    def config(self) -> ModelConfig:
        """Its configuration."""

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Final hidden states [B, T, D]."""

    def logits(self, hidden_ND: Tensor) -> Tensor:
        """The head: [N, D] -> [N, V]."""


class Request(Protocol):
    """lm-eval's Instance, as far as it is read here."""

    args: tuple[str, str]  # context, continuation


class _Target(NamedTuple):
    """What one request wants scored on a row: the ids that follow its last positions."""

    request: int
    ids: np.ndarray


class _Row(NamedTuple):
    """Input ids and all that is scored on them: choices of a single token share one row."""

    ids: np.ndarray
    targets: list[_Target]


class MobileMoELM:
    """Log-likelihoods by any model that fulfils `Model`, with lm-eval's conventions.

    A context always begins with the tokenizer's BOS. What does not fit into the model's context is cut on the left,
    BOS included, as lm-eval does; `num_truncated` counts such requests.
    """

    def __init__(
        self, model: Model, tokenizer: Tokenizer, *, batch_tokens: int, device: str | torch.device = "cpu"
    ) -> None:
        """`batch_tokens`: most tokens in a batch, padding included (one row is always taken)."""
        self.model = model
        self.tokenizer = tokenizer
        self.batch_tokens = batch_tokens
        self.device = device
        self.num_truncated = 0

    def loglikelihood(self, requests: Sequence[Request], desc: str = "scoring") -> list[tuple[float, bool]]:
        """For each (context, continuation): the continuation's log-probability in nats, and whether greedy decoding
        would give exactly it. `desc` is the label of the progress bar."""
        rows = self._encode([request.args for request in requests])
        rows.sort(key=lambda row: len(row.ids), reverse=True)  # the longest first: memory trouble shows at once
        answers: dict[int, tuple[float, bool]] = {}
        total = sum(len(row.ids) for row in rows)
        with tqdm(total=total, desc=desc, unit="token", unit_scale=True, disable=None) as bar:
            start = 0
            while start < len(rows):
                batch = rows[start:][: max(1, self.batch_tokens // len(rows[start].ids))]
                answers |= self._score(batch)
                start += len(batch)
                bar.update(sum(len(row.ids) for row in batch))
        return [answers[index] for index in range(len(requests))]

    def _encode(self, pairs: Sequence[tuple[str, str]]) -> list[_Row]:
        longest = self.model.config.max_position_embeddings
        targets: dict[bytes, list[_Target]] = {}  # by input ids
        for start in range(0, len(pairs), ENCODE_CHUNK):
            # lm-eval's boundary: spaces at the end of the context belong to the continuation, and the text is encoded
            # as a whole, because tokens need not end where the context does.
            chunk = [
                (context.rstrip(), context + continuation) for context, continuation in pairs[start:][:ENCODE_CHUNK]
            ]
            texts = list(dict.fromkeys(text for pair in chunk for text in pair))
            ids = dict(zip(texts, self.tokenizer.encode_batch(texts), strict=True))
            for request, (context, whole) in enumerate(chunk, start):
                num_targets = len(ids[whole]) - len(ids[context])
                if num_targets < 1:
                    raise ValueError(f"no token to score after the context {context[-80:]!r} in {whole[-80:]!r}")
                sequence = np.array([self.tokenizer.bos_id, *ids[whole]], dtype=np.int32)
                self.num_truncated += len(sequence) > longest + 1
                sequence = sequence[-(longest + 1) :]
                target = _Target(request, sequence[1:][-num_targets:])
                targets.setdefault(sequence[:-1].tobytes(), []).append(target)
        return [_Row(np.frombuffer(key, np.int32), wanted) for key, wanted in targets.items()]

    @torch.inference_mode()
    def _score(self, batch: list[_Row]) -> dict[int, tuple[float, bool]]:
        """Run one batch, longest row first; answers by request."""
        tokens_BT = np.zeros((len(batch), len(batch[0].ids)), dtype=np.int64)
        rows, columns = [], []
        for index, row in enumerate(batch):
            length = len(row.ids)
            tokens_BT[index, :length] = row.ids
            for target in row.targets:
                rows.append(torch.full((len(target.ids),), index))
                columns.append(torch.arange(length - len(target.ids), length))
        wanted = [target for row in batch for target in row.targets]
        hidden_BTD = self.model.hidden(torch.from_numpy(tokens_BT).to(self.device))
        hidden_ND = hidden_BTD[torch.cat(rows).to(self.device), torch.cat(columns).to(self.device)]
        target_N = torch.from_numpy(np.concatenate([target.ids for target in wanted])).long().to(self.device)
        logprob_N, greedy_N = self._head(hidden_ND, target_N)
        sizes = [len(target.ids) for target in wanted]
        return {
            target.request: (float(logprob.sum()), bool(greedy.all()))
            for target, logprob, greedy in zip(wanted, logprob_N.split(sizes), greedy_N.split(sizes), strict=True)
        }

    def _head(self, hidden_ND: Tensor, target_N: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probability of each target (float64, on the CPU), and whether it is the most probable token."""
        size = max(1, HEAD_ELEMENTS // self.tokenizer.vocab_size)
        logprobs, greedy = [], []
        for hidden, target in zip(hidden_ND.split(size), target_N.split(size), strict=True):
            logits = self.model.logits(hidden).float()
            logprobs.append(logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1))
            greedy.append(logits.argmax(1) == target)
        return torch.cat(logprobs).double().cpu(), torch.cat(greedy).cpu()
