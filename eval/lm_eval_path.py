"""lm-eval's own way to run a model, through transformers: what this project's engine is compared with."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from mm_train.cli import UserError


class TheirPath:
    """lm-eval's HFLM on a Hugging Face folder (releases of this project are such folders), float32 on the CPU or bf16
    on a GPU. `tokens` counts what went through the model, padding included; while not `computes`, its logits are zeros.
    `one_row`: choices of a single token share a row, as is lm-eval's default."""

    def __init__(self, folder: Path, batch_size: int, device: str = "cpu", one_row: bool = True) -> None:
        import torch
        import transformers
        from lm_eval.models.huggingface import HFLM

        import mm_train.hf

        mm_train.hf.register()
        transformers.logging.set_verbosity_error()
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        try:
            model: Any = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise UserError(f"transformers cannot load {folder}: {error}") from None
        self.tokens, self.computes = 0, True
        forward = model.forward

        def counted(input_ids: Any = None, **options: Any) -> Any:
            self.tokens += input_ids.numel()
            if not self.computes:
                return SimpleNamespace(logits=torch.zeros(1).expand(*input_ids.shape, model.config.vocab_size))
            return forward(input_ids=input_ids, **options)

        model.forward = counted
        self.lm = HFLM(
            pretrained=model.to(device).eval(),
            tokenizer=tokenizer,
            batch_size=batch_size,
            add_bos_token=True,
            logits_cache=one_row,
        )

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests, which are all of one type."""
        if not requests:
            return []
        run = getattr(self.lm, requests[0].request_type)
        with contextlib.redirect_stdout(io.StringIO()):
            return run(requests, disable_tqdm=True)
