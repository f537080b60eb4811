"""lm-eval's own way to run a model, through transformers: what this project's engine is compared with."""

import contextlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_train.cli import UserError


class TheirPath:
    """lm-eval's HFLM on a Hugging Face folder (releases of this project are such folders), float32 on the CPU or bf16
    on a GPU. `tokens` counts what went through the model, padding included."""

    def __init__(self, folder: Path, batch_size: int, device: str = "cpu") -> None:
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
        self.tokens = 0
        forward = model.forward

        def counted(input_ids: Any = None, **options: Any) -> Any:
            self.tokens += input_ids.numel()
            return forward(input_ids=input_ids, **options)

        model.forward = counted
        self.lm = HFLM(
            pretrained=model.to(device).eval(), tokenizer=tokenizer, batch_size=batch_size, add_bos_token=True
        )

    def answer(self, requests: Sequence[Any]) -> list[Any]:
        """Answers in the order of the requests, which are all of one type."""
        if not requests:
            return []
        run = getattr(self.lm, requests[0].request_type)
        with contextlib.redirect_stdout(io.StringIO()):
            return run(requests, disable_tqdm=True)
