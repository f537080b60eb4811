"""Speed and memory of models on this machine as a device would run them: prefill, first token, decode, working set.

python -m eval.profile --models s.gguf mobilellm-pro.gguf --contexts 256,1024,4096

Every number is a median over repeats; in each repeat all models take a turn, in a process of its own. A prompt of real
text and one of a single repeated token are told apart, because what a mixture of experts reads depends on its input:
"touched" counts the bytes of the file that a prompt makes the runtime read (pages of a mapped file, Linux).
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from eval.profile_report import Profile, chart, table
from eval.profile_worker import Job, to_json
from mm_train.cli import UserError, command
from mm_train.files import write_atomic, writing
from mm_train.gguf.read import Facts, read_model

KINDS = ("real", "repeated")
ADB = (
    "--device adb:SERIAL is not automated. On a phone: build llama.cpp for Android (its docs/android.md), push"
    " llama-bench and the .gguf with adb to /data/local/tmp, and run there: llama-bench -m model.gguf -p 256,1024 -n 64"
    " -t 4. For a network with scaled positions speed does not depend on the flags of its README.md."
)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m eval.profile", description=__doc__.splitlines()[0], epilog=ADB)
    parser.add_argument("--models", nargs="+", type=Path, required=True, metavar="FILE.gguf", help="GGUF files")
    parser.add_argument("--baseline", help="name of the model that ratios refer to (default: the last one)")
    parser.add_argument("--contexts", default="256,1024", help="lengths of prompts, in tokens (default %(default)s)")
    parser.add_argument(
        "--prompts", type=Path, help="file with real text (default: the README and docs of this project)"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="written on from each (default %(default)s)")
    parser.add_argument("--repeats", type=int, default=3, help="of everything, by turns (default %(default)s)")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="default: all cores")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/profile"), help="folder of results (default %(default)s)"
    )
    parser.add_argument("--device", default="cpu", help="cpu; for phones see below")
    args = parser.parse_args(argv)
    if args.device != "cpu":
        raise UserError(ADB if args.device.startswith("adb:") else f"--device {args.device!r}: only cpu is automated")
    contexts = numbers(args.contexts)
    if args.new_tokens < 2 or args.repeats < 1 or args.threads < 1:
        raise UserError(
            f"--new-tokens {args.new_tokens}, --repeats {args.repeats}, --threads {args.threads}: at least 2, 1 and 1"
        )
    models = opened(args.models)
    baseline = args.baseline or list(models)[-1]
    if baseline not in models:
        raise UserError(f"--baseline {baseline!r} is none of the models: {', '.join(models)}")
    jobs = plan(args, models, contexts)
    profile = Profile(
        machine=machine(),
        threads=args.threads,
        bandwidth=bandwidth(args.threads),
        baseline=baseline,
        models={name: facts.numbers() for name, facts in models.items()},
        rows=run(jobs, args.repeats),
    )
    text = table(profile)
    print(text)
    with writing(args.out):
        args.out.mkdir(parents=True, exist_ok=True)
        write_atomic(args.out / "profile.json", (json.dumps(profile.values(), indent=1) + "\n").encode())
        write_atomic(args.out / "profile.md", text.encode())
        write_atomic(args.out / "profile.svg", chart(profile))
    print(f"{args.out}/profile.json, .md, .svg")
    return 0


def numbers(text: str) -> list[int]:
    """Lengths of prompts, ascending. Raises UserError."""
    try:
        found = sorted({int(word) for word in text.split(",")})
    except ValueError:
        raise UserError(f"--contexts {text!r} must be numbers with commas between, as in 256,1024") from None
    if found[0] < 16:
        raise UserError(f"--contexts {text!r}: a prompt has at least 16 tokens")
    return found


def opened(paths: Sequence[Path]) -> dict[str, Facts]:
    """The models by name. Raises UserError for a file that is none, and for two of one name."""
    models: dict[str, Facts] = {}
    for path in paths:
        facts = read_model(path / "model.gguf" if path.is_dir() else path)
        if facts.name in models:
            raise UserError(f"{path} and another model are both called {facts.name}")
        models[facts.name] = facts
    return models


def plan(args: argparse.Namespace, models: dict[str, Facts], contexts: list[int]) -> list[tuple[str, Job]]:
    """Jobs of one repeat, with the name of their model. Raises UserError when there is too little text or context."""
    text = read_text(args.prompts)
    jobs = []
    for name, facts in models.items():
        if contexts[-1] + args.new_tokens > facts.context:
            raise UserError(
                f"{name} holds {facts.context} tokens: too few for --contexts {contexts[-1]} and what follows"
            )
        tokenizer = facts.tokenizer()
        tokens = [tokenizer.bos_id, *tokenizer.encode(text)]
        if len(tokens) < contexts[-1]:
            raise UserError(
                f"the text has {len(tokens)} tokens for {name}: --contexts {contexts[-1]} needs more --prompts"
            )
        word = tokens[1]
        prompts = [
            (kind, tokens[:length] if kind == "real" else [word] * length) for length in contexts for kind in KINDS
        ]
        room = contexts[-1] + args.new_tokens + 8
        how = (str(facts.path), args.threads, room, args.new_tokens, prompts)
        jobs += [(name, Job(*how, memory)) for memory in (False, True)]
    return jobs


def read_text(path: Path | None) -> str:
    """Of the file, or of this project's own documents."""
    root = Path(__file__).resolve().parents[1]
    paths = [path] if path else [root / "README.md", *sorted((root / "docs").glob("*.md"))]
    try:
        return "\n".join(file.read_text(encoding="utf-8") for file in paths)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read prompts: {error}") from None


def run(jobs: list[tuple[str, Job]], repeats: int) -> list[dict[str, Any]]:
    """Every number of every job and repeat."""
    rows: list[dict[str, Any]] = []
    with tqdm(desc="profile", total=repeats * len(jobs), unit="run") as bar:
        for repeat in range(repeats):
            for name, job in jobs:
                bar.set_postfix_str(name)
                if not job.memory or repeat == 0:  # what is touched does not vary
                    rows += [{"model": name, "repeat": repeat} | row for row in worker(job)]
                bar.update()
    return rows


def worker(job: Job) -> list[dict[str, Any]]:
    """Do a job in a process of its own. Raises UserError when it fails."""
    command = [sys.executable, "-m", "eval.profile_worker"]
    done = subprocess.run(command, input=to_json(job), capture_output=True, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode or not rows:
        said = rows[-1].get("error") if rows else (done.stderr.strip().splitlines() or ["nothing"])[-1]
        raise UserError(f"profiling {job.path} failed with status {done.returncode}: {said}")
    return rows


def bandwidth(threads: int, size: int = 1 << 28, repeats: int = 7) -> float:
    """Bytes a second that `threads` threads read from memory: the best of several sums over a quarter of a gibibyte."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    values = torch.ones(size // 4, dtype=torch.float32)
    best = float("inf")
    for _ in range(repeats):
        started = time.perf_counter()
        values.sum()
        best = min(best, time.perf_counter() - started)
    torch.set_num_threads(before)
    return size / best


def machine() -> str:
    """The processor, in words."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return "unknown processor"


if __name__ == "__main__":
    sys.exit(main())
