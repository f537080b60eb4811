"""A GGUF file in llama.cpp, through the wheel xllamacpp: log-probabilities, greedy text, timings."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mm_train.cli import UserError
from mm_train.gguf.layout import ARCHITECTURE
from mm_train.gguf.read import read_model


class LlamaCpp:
    """A model in llama.cpp, one sequence at a time, on the CPU."""

    def __init__(
        self, path: Path, context: int = 2048, threads: int = 1, exact: bool = False, paged: bool = False
    ) -> None:
        """`exact`: keys and values in float32 and no flash attention, to compare numbers rather than speed. `paged`:
        weights stay in the mapped file as they are, not rearranged for speed, to see which of them are read.

        Raises UserError where there is no such file, no llama.cpp, or one that cannot load it.
        """
        try:
            import xllamacpp
        except ImportError:
            raise UserError("running GGUF needs the package xllamacpp: pip install 'mobilemoe-train[device]'") from None
        facts = read_model(path)
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
        if "mobilemoe.yarn-beta-fast" in self.facts:  # llama.cpp does not read these from the file
            params.yarn_beta_fast = self.facts["mobilemoe.yarn-beta-fast"]
            params.yarn_beta_slow = self.facts["mobilemoe.yarn-beta-slow"]
        try:
            self._server = xllamacpp.Server(params)
        except Exception as error:  # whatever the wheel raises
            raise UserError(f"llama.cpp cannot load {path}: {error}") from None
        self.vocab_size = int(self.facts[f"{ARCHITECTURE}.vocab_size"])

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """float32 [len(positions), V]: log-probabilities of what follows tokens[: position + 1]."""
        out = np.full((len(positions), self.vocab_size), -np.inf, np.float32)
        for row, position in enumerate(positions):
            for index, log_prob in self._next(tokens[: position + 1], self.vocab_size):
                out[row, index] = log_prob
        return out

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
