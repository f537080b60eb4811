"""A .pte file in ExecuTorch's Python runtime: log-probabilities and greedy text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mm_train.cli import UserError
from mm_train.pte.program import load_library, quiet


class ExecuTorch:
    """A program, one sequence at a time."""

    def __init__(self, path: Path) -> None:
        """Raises UserError where there is no such file, no ExecuTorch, or one that cannot load it."""
        if not path.is_file():
            raise UserError(f"ExecuTorch program not found: {path}")
        load_library()
        from executorch.runtime import Runtime

        try:
            with quiet():
                self._program: Any = Runtime.get().load_program(path)
                facts = {name: self._program.load_method(name).execute([])[0] for name in ("get_max_seq_len",)}
                self._method = self._program.load_method("forward")
        except Exception as error:  # whatever the runtime raises
            raise UserError(f"ExecuTorch cannot load {path}: {' '.join(str(error).split())}") from None
        self.chunk = int(facts["get_max_seq_len"])

    def _read(self, tokens: Sequence[int], start: int) -> np.ndarray:
        """Log-probabilities [V] after `tokens`, which come at `start`."""
        for first in range(0, len(tokens), self.chunk):
            part = torch.tensor([list(tokens[first : first + self.chunk])])
            logits = self._method.execute([part, torch.tensor([start + first])])[0]
        return logits[0].float().log_softmax(-1).numpy()

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """float32 [len(positions), V]: log-probabilities of what follows tokens[: position + 1]; positions ascend."""
        found, start = [], 0
        for position in positions:
            found.append(self._read(tokens[start : position + 1], start))
            start = position + 1
        return np.stack(found)

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation of `tokens`, not ended by stop tokens."""
        found: list[int] = []
        unread, start = list(tokens), 0
        for _ in range(num_tokens):
            found.append(int(self._read(unread, start).argmax()))
            start += len(unread)
            unread = found[-1:]
        return found
