"""What runs a model: this project, transformers, llama.cpp or ExecuTorch, behind two questions that all can answer."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from mm_train import decode
from mm_train.cli import UserError
from mm_train.files import is_file
from mm_train.model import MobileMoE


class Runtime(Protocol):
    """A model that runs somewhere."""

    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        """float32 [len(positions), V]: log-probabilities of what follows tokens[: position + 1]."""

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        """The likeliest continuation of `tokens`, not ended by stop tokens."""


class Ours:
    """This project's model."""

    def __init__(self, model: MobileMoE) -> None:
        self.model = model

    @torch.inference_mode()
    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        hidden_TD = self.model.hidden(torch.tensor([list(tokens)]))[0]
        return self.model.logits(hidden_TD[list(positions)]).float().log_softmax(-1).numpy()

    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        return [step[0] for step in decode.generate(self.model, [tokens], num_tokens)]


class Transformers:
    """A release folder in transformers, by the code that lies in it."""

    def __init__(self, folder: Path) -> None:
        from transformers import AutoModelForCausalLM

        from mm_train import hf

        hf.register()
        self.model = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
        self.model.generation_config.eos_token_id = None  # texts are compared, not ended

    @torch.inference_mode()
    def log_probs(self, tokens: Sequence[int], positions: Sequence[int]) -> np.ndarray:
        logits_TV = self.model(input_ids=torch.tensor([list(tokens)])).logits[0]
        return logits_TV[list(positions)].float().log_softmax(-1).numpy()

    @torch.inference_mode()
    def greedy(self, tokens: Sequence[int], num_tokens: int) -> list[int]:
        ids = torch.tensor([list(tokens)])
        out = self.model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False)
        return out[0, len(tokens) :].tolist()


def gguf_file(path: Path) -> Path | None:
    """The GGUF file that `path` is or holds; None when there is none."""
    if path.suffix == ".gguf":
        return path
    return path / "model.gguf" if is_file(path / "model.gguf") else None


def pte_file(path: Path) -> Path | None:
    """The ExecuTorch program that `path` is or holds; None when there is none."""
    if path.suffix == ".pte":
        return path
    return path / "model.pte" if is_file(path / "model.pte") else None


def runtimes(path: Path, context: int, threads: int) -> dict[str, Runtime]:
    """Everything here that runs the model at `path` as its users will, by name. Raises UserError where nothing does."""
    if (gguf := gguf_file(path)) is not None:
        from mm_train.gguf.runtime import LlamaCpp

        return {"llama.cpp": LlamaCpp(gguf, context, threads, exact=True)}
    if (pte := pte_file(path)) is not None:
        from mm_train.pte.runtime import ExecuTorch

        return {"ExecuTorch": ExecuTorch(pte)}
    if is_file(path / "config.json"):
        from mm_train.release import load_release

        return {"ours": Ours(load_release(path)), "transformers": Transformers(path)}
    raise UserError(f"{path} is no GGUF or ExecuTorch file or folder and no release folder: export writes these")
