"""One process of eval.profile: a GGUF file in llama.cpp, timed on some prompts, or watched for the memory they touch.

Reads a Job as JSON from stdin and writes one JSON object a line to stdout: {"context", "kind", ...numbers}.
"""

import json
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass
class Job:
    """What to do with one file."""

    path: str
    threads: int
    context: int  # room for the longest prompt and what is written on
    new_tokens: int
    prompts: list[tuple[str, list[int]]]  # kind of each, and its tokens
    memory: bool  # watch which pages of the file are touched, instead of timing


def main() -> int:
    job = Job(**json.load(sys.stdin))
    try:
        for result in measure(job):
            print(json.dumps(result), flush=True)
    except Exception as error:  # the parent says it in one line
        print(json.dumps({"error": " ".join(str(error).split())}), flush=True)
        return 1
    return 0


def measure(job: Job) -> Any:
    """Yield the numbers of each prompt."""
    from mm_train.gguf.runtime import LlamaCpp

    before = resident()
    model = LlamaCpp(Path(job.path), job.context, job.threads, paged=job.memory)
    if not job.memory:  # the first pass pays for buffers and page tables
        model.complete(job.prompts[0][1][:16], 2, cache_prompt=False)
    for kind, tokens in job.prompts:
        facts: dict[str, Any] = {"kind": kind, "context": len(tokens)}
        if job.memory:
            Path("/proc/self/clear_refs").write_text("1")
            model.complete(tokens, 1, cache_prompt=False)
            yield facts | {"touched": touched(job.path)}
            continue
        timings = model.complete(tokens, job.new_tokens, cache_prompt=False)["timings"]
        yield facts | {
            "prefill": timings["prompt_n"] / timings["prompt_ms"] * 1000,
            "first_token": timings["prompt_ms"] / 1000,
            # The first token comes out of the prompt's own pass.
            "decode": (timings["predicted_n"] - 1) / timings["predicted_ms"] * 1000,
            "resident": resident(peak=True) - before,
        }


def resident(peak: bool = False) -> int:
    """Bytes of memory of this process, now or at most."""
    key = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def touched(path: str) -> int:
    """Bytes of a mapped file whose pages were used since /proc/self/clear_refs was written."""
    real, total, inside = os.path.realpath(path), 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if not first.endswith(":"):
            inside = line.endswith(real)
        elif inside and first == "Referenced:":
            total += int(line.split()[1]) * 1024
    return total


def to_json(job: Job) -> str:
    """For the stdin of a worker."""
    return json.dumps(asdict(job))


if __name__ == "__main__":
    sys.exit(main())
