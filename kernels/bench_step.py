"""A whole training step for kernels.bench: mm_train.bench_train in a process of its own, because kernels import nothing
above them."""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONTEXT = 2048
MICRO_BATCH_TOKENS = 32768  # lowered where memory is out
TIME_LIMIT = 110  # seconds in all for one way of dispatching, with its tries of smaller micro-batches


def train_step(size: str, dispatch: str, on_gpu: bool) -> dict[str, Any]:
    """Tokens/s, MFU and memory of this trainer on one device, or {"absent": why}.

    On a GPU in bfloat16 and rows of 2048 tokens, with half the micro-batch where memory is out, and so on; `lowered`
    says so. On a CPU a small step in float32.
    """
    tokens, context = (MICRO_BATCH_TOKENS, CONTEXT) if on_gpu else (512, 256)
    wanted, deadline = tokens, time.monotonic() + TIME_LIMIT
    facts: dict[str, Any] = {}
    while tokens >= context and time.monotonic() < deadline:
        left = deadline - time.monotonic()
        facts = _measure(size, dispatch, tokens, context, "bfloat16" if on_gpu else "float32", left)
        if "out of memory" not in facts.get("absent", "").lower():
            return facts | {"lowered": tokens != wanted}
        tokens //= 2
    return facts


def _measure(size: str, dispatch: str, tokens: int, context: int, dtype: str, seconds: float) -> dict[str, Any]:
    words = [
        str(ROOT / "configs/model" / f"{size}.yaml"),
        f"train.dtype={dtype}",
        f"data.seq_len={context}",
        f"train.micro_batch_size={tokens // context}",
        f"train.global_batch_tokens={tokens}",
        f"moe.dispatch={dispatch}",
    ]
    steps, repeats = ("5", "3") if dtype == "bfloat16" else ("2", "1")
    options = ["--alone", "--json", "--steps", steps, "--repeats", repeats]
    command = [sys.executable, "-m", "mm_train.bench_train", *words, *options]
    try:
        run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return {"absent": f"with {tokens:,} tokens: took longer than {seconds:.0f} s"}
    if run.returncode:
        said = [line for line in run.stderr.splitlines() if line.strip()]
        reason = (said or ["ended without a word"])[-1].removeprefix("error: ")
        return {"absent": f"with {tokens:,} tokens: {reason}"}
    facts = json.loads(run.stdout)
    (way,) = facts["ways"].values()
    return {
        "dispatch": dispatch,
        "micro_batch_tokens": tokens,
        "context": context,
        "dtype": dtype,
        "tokens_per_second": way["median"],
        "measurements": way["tokens_per_second"],
        "mfu": way["mfu"],
        "memory_gib": way["memory_gib"],
        "loss": way["loss"],
    }
