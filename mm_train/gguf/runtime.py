"""A GGUF file in llama.cpp, through the wheel xllamacpp: log-probabilities, greedy text, timings.

What the wheel offers is llama.cpp's server: logits of the last token of a prompt alone, as probabilities of the tokens
before sampling. What a prompt shares with the one before it stays in the key-value cache, so asking for position after
position of a text costs one step of decoding each, and the head is only computed where something is asked for.
"""

import importlib.metadata
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_train.cli import UserError
from mm_train.gguf.layout import ARCHITECTURE
from mm_train.gguf.read import Facts, read_model

NEAREST = 64  # tokens whose log-probabilities are asked for along with that of the token in question
LEAST = -104.0  # nats: what llama.cpp gives as zero, less than the smallest float32


class LlamaCpp:
    """A model in llama.cpp, one sequence at a time, on the CPU.

    `room`: most tokens of a prompt. llama.cpp takes no prompt that leaves no place for a token after it, and no more
    of them than the model was made for.
    """

    def __init__(
        self,
        path: Path,
        context: int = 2048,
        threads: int = 1,
        exact: bool = False,
        paged: bool = False,
        known: Facts | None = None,
    ) -> None:
        """`exact`: keys and values in float32 and no flash attention, to compare numbers rather than speed. `paged`:
        weights stay in the mapped file as they are, not rearranged for speed, to see which of them are read. `known`:
        what read_model says of the file, where it is at hand: that takes seconds with a large vocabulary.

        Raises UserError where there is no such file, no llama.cpp, or one that cannot load it.
        """
        try:
            import xllamacpp
        except ImportError:
            raise UserError("running GGUF needs the package xllamacpp: pip install 'mobilemoe-train[device]'") from None
        facts = known or read_model(path)
        self.facts = facts.keys
        self._letter = facts.tokens.index("a")  # a vocabulary of bytes has every letter
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_batch, params.n_ubatch = context, context, min(context, 512)
        params.n_parallel, params.n_gpu_layers = 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.warmup, params.verbosity = False, -1
        if exact:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.fit_params, params.cache_ram_mib = False, 0
        if paged:
            params.no_extra_bufts, params.load_mode = True, xllamacpp.llama_load_mode.LLAMA_LOAD_MODE_MMAP
        betas = [self.facts.get(f"mobilemoe.yarn-beta-{which}") for which in ("fast", "slow")]
        self.yarn_betas = betas if None not in betas else None  # llama.cpp does not read these from the file
        if self.yarn_betas:
            params.yarn_beta_fast, params.yarn_beta_slow = self.yarn_betas
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # whatever the wheel raises
            raise UserError(f"llama.cpp cannot load {path}: {error}") from None
        self.vocab_size = int(self.facts[f"{ARCHITECTURE}.vocab_size"])
        self.room = min(context, facts.context) - 1

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """float32 [len(positions), V]: log-probabilities of what follows tokens[: position + 1]."""
        out = np.full((len(positions), self.vocab_size), -np.inf, np.float32)
        for row, position in enumerate(positions):
            for index, log_prob in self._next(tokens[: position + 1], self.vocab_size):
                out[row, index] = log_prob
        return out

    def likelihoods(self, tokens: Sequence[int], targets: Iterable[int]) -> tuple[dict[int, float], int]:
        """Log-probability of each target after `tokens`, and the likeliest token.

        A target is made to be sampled; llama.cpp says its probability before that, and those of the likeliest tokens.
        """
        found: dict[int, float] = {}
        best = -1
        for target in targets:
            if target in found:
                continue
            answer = self.complete(list(tokens), 1, n_probs=NEAREST, cache_prompt=True, logit_bias=[[target, 1e6]])
            said = (answer["choices"][0]["logprobs"] or {}).get("content")
            if said:
                found[target] = said[0]["logprob"]
                candidates = [(entry["id"], entry["logprob"]) for entry in said[0]["top_logprobs"]]
            else:  # a target that ends within a character
                candidates = self._next(tokens, self.vocab_size)
            best = candidates[0][0]
            found |= candidates
        return {target: max(found[target], LEAST) for target in targets}, best

    def write(self, tokens: Sequence[int], num_tokens: int, stops: Sequence[str]) -> tuple[str, int]:
        """The likeliest continuation up to one of `stops` or the end of a text, and its number of tokens."""
        answer = self.complete(list(tokens), num_tokens, ignore_eos=False, stop=list(stops), cache_prompt=True)
        return answer["choices"][0]["text"], answer["usage"]["completion_tokens"]

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation of `tokens`, not ended by stop tokens."""
        found: list[int] = []
        for _ in range(num_tokens):
            found.append(self._next([*tokens, *found], 1)[0][0])
        return found

    def _next(self, tokens: Sequence[int], number: int) -> list[tuple[int, float]]:
        """The `number` likeliest next tokens with their log-probabilities.

        An answer that ends within a character has neither text nor probabilities, so a letter is made to be sampled;
        the probabilities are those before sampling.
        """
        forced = [[self._letter, 1e6]]
        answer = self.complete(list(tokens), 1, n_probs=number, cache_prompt=True, logit_bias=forced)
        candidates = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        return [(candidate["id"], candidate["logprob"]) for candidate in candidates]

    def complete(self, prompt: list[int], num_tokens: int, **options: Any) -> dict[str, Any]:
        """llama.cpp's answer to a request, "timings" included."""
        request = {"prompt": prompt, "n_predict": num_tokens, "temperature": 0, "ignore_eos": True} | options
        answer = self._server.handle_completions(request)
        if "choices" not in answer:
            raise UserError(f"llama.cpp refused a request: {answer.get('error', answer)!r:.300}")
        return answer


def version() -> str:
    """Of the wheel, or "" where it is not installed."""
    try:
        return importlib.metadata.version("xllamacpp")
    except importlib.metadata.PackageNotFoundError:
        return ""
