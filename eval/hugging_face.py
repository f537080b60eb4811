"""The engine for any causal language model of transformers: one sequence a row, logits only of the last columns.

Masks of tries are not portable among its models, so choices do not share a row unless they differ in their last token
alone. Batches are made of rows of like length and hold at most `batch_tokens` tokens.
"""

import hashlib
import inspect
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from eval.packed import Likelihood, Work
from eval.sequences import Prompt, Scored, finish
from eval.tries import order_key
from mm_train.cli import UserError, first_line


class HuggingFaceCodec:
    """A tokenizer of transformers, with the special tokens that it adds by itself."""

    def __init__(self, tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
        self.tokenizer, self.stop_ids = tokenizer, stop_ids
        self.eos_text = tokenizer.eos_token or ""
        vocabulary = repr(sorted(tokenizer.get_vocab().items())).encode()
        self.sha256 = hashlib.sha256(vocabulary + repr(tokenizer.encode("a b")).encode()).hexdigest()

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with what the model expects at the beginning."""
        return self.tokenizer(texts)["input_ids"] if texts else []

    def encode_alone(self, text: str) -> list[int]:
        """Ids of a text without anything at its beginning."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def first(self) -> list[int]:
        """What stands for an empty context."""
        bos = self.tokenizer.bos_token_id
        return [self.tokenizer.eos_token_id if bos is None else bos]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)


def load(path: Path, dtype: torch.dtype, device: str) -> tuple[Any, HuggingFaceCodec]:
    """Model and tokenizer of a folder; nothing is fetched. Raises UserError when transformers cannot load it."""
    import transformers

    import mm_train.hf

    mm_train.hf.register()
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
        model: Any = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"transformers cannot load {path}: {first_line(error)}") from None
    stops = model.generation_config.eos_token_id
    stops = tokenizer.eos_token_id if stops is None else stops
    stop_ids = tuple(stops) if isinstance(stops, list) else (stops,) if stops is not None else ()
    return model.to(device).eval(), HuggingFaceCodec(tokenizer, stop_ids)


class HuggingFaceEngine:
    """Answers by a causal language model of transformers."""

    def __init__(self, model: Any, codec: HuggingFaceCodec, batch_tokens: int) -> None:
        """`batch_tokens`: most tokens in a batch, padding included (one row is always taken)."""
        self.model, self.codec, self.batch_tokens = model, codec, batch_tokens
        self.context = model.config.get_text_config().max_position_embeddings
        self.work = Work()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters

    @torch.inference_mode()
    def score(self, sequences: Sequence[Scored]) -> Iterator[dict[int, Likelihood]]:
        """Answers by number of the sequence, batch by batch."""
        same: dict[bytes, list[int]] = {}  # by input: choices of a single token have one row
        for number, sequence in enumerate(sequences):
            same.setdefault(order_key(sequence.inputs), []).append(number)
        rows = sorted(same.values(), key=lambda numbers: len(sequences[numbers[0]].inputs), reverse=True)
        start = 0
        while start < len(rows):
            size = max(1, self.batch_tokens // len(sequences[rows[start][0]].inputs))
            yield self._score(rows[start:][:size], sequences)
            start += size

    def _score(self, batch: list[list[int]], sequences: Sequence[Scored]) -> dict[int, Likelihood]:
        inputs = [sequences[numbers[0]].inputs for numbers in batch]
        width = len(inputs[0])
        tokens_BT = np.zeros((len(batch), width), dtype=np.int64)
        for row, ids in enumerate(inputs):
            tokens_BT[row, : len(ids)] = ids  # padding on the right: a causal model does not see it
        used = sum(map(len, inputs))
        self.work.tokens += used
        self.work.padding += tokens_BT.size - used
        first = min(
            len(ids) - sequences[number].num_targets
            for ids, numbers in zip(inputs, batch, strict=True)
            for number in numbers
        )
        tokens = torch.from_numpy(tokens_BT).to(self.model.device)
        keep = {"logits_to_keep": width - first} if self._keeps else {}
        logits_BTV = self.model(input_ids=tokens, **keep).logits
        offset = width - logits_BTV.shape[1]
        answers = {}
        for row, (ids, numbers) in enumerate(zip(inputs, batch, strict=True)):
            for number in numbers:
                wanted = sequences[number]
                logits = logits_BTV[row, len(ids) - wanted.num_targets - offset : len(ids) - offset].float()
                target = torch.from_numpy(wanted.ids[-wanted.num_targets :]).long().to(logits.device)
                logprob = logits.gather(1, target[:, None])[:, 0] - logits.logsumexp(1)
                answers[number] = (float(logprob.double().sum()), bool((logits.argmax(1) == target).all()))
        return answers

    @torch.inference_mode()
    def write(self, prompts: Sequence[Prompt]) -> Iterator[dict[int, str]]:
        """Texts by number of the prompt, batch by batch."""
        order = sorted(
            range(len(prompts)), key=lambda n: (prompts[n].max_new, prompts[n].stops, len(prompts[n].ids)), reverse=True
        )
        start = 0
        while start < len(order):
            head = prompts[order[start]]
            size = max(1, self.batch_tokens // max(len(prompts[number].ids) for number in order[start:]))
            batch = [
                n for n in order[start:][:size] if (prompts[n].max_new, prompts[n].stops) == (head.max_new, head.stops)
            ]
            yield self._write(batch, prompts)
            start += len(batch)

    def _write(self, batch: list[int], prompts: Sequence[Prompt]) -> dict[int, str]:
        head, width = prompts[batch[0]], max(len(prompts[number].ids) for number in batch)
        pad = self.codec.tokenizer.pad_token_id or 0
        tokens_BT = np.full((len(batch), width), pad, dtype=np.int64)
        mask_BT = np.zeros_like(tokens_BT)
        for row, number in enumerate(batch):
            ids = prompts[number].ids
            tokens_BT[row, width - len(ids) :], mask_BT[row, width - len(ids) :] = ids, 1
        out_BT = self.model.generate(
            input_ids=torch.from_numpy(tokens_BT).to(self.model.device),
            attention_mask=torch.from_numpy(mask_BT).to(self.model.device),
            max_new_tokens=head.max_new,
            do_sample=False,
            pad_token_id=pad,
            stop_strings=list(head.stops),
            tokenizer=self.codec.tokenizer,
        )
        written = [row[width:] for row in out_BT.tolist()]
        self.work.tokens += int(mask_BT.sum()) + sum(map(len, written))
        return {number: finish(self.codec.decode(ids), head.stops) for number, ids in zip(batch, written, strict=True)}
