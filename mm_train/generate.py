"""Let a model write: continue prompts, or hold a conversation.

python -m mm_train.generate --model runs/quickstart/export --prompt "import os"
python -m mm_train.generate --model runs/quickstart/export --chat
"""

import argparse
import io
import itertools
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from mm_train.cli import UserError, command
from mm_train.decode import generate
from mm_train.files import write_atomic
from mm_train.kv_cache import KVCache
from mm_train.model import MobileMoE
from mm_train.model_folder import find_tokenizer, load_model
from mm_train.tokenizer import Tokenizer, check_vocabulary, load_tokenizer


def encode_prompt(tokenizer: Tokenizer, prompt: str, chat: bool, system: str | None = None) -> list[int]:
    """Ids of a text to continue, or of a first question in the chat format. Raises UserError for broken UTF-8."""
    for text in (prompt, system or ""):
        if any("\ud800" <= letter <= "\udfff" for letter in text):
            raise UserError(f"the prompt {text!r:.80} is not valid UTF-8")
    if not chat:
        return [tokenizer.bos_id, *tokenizer.encode(prompt)]
    messages = [{"role": "system", "content": system}] if system else []
    return tokenizer.render_chat([*messages, {"role": "user", "content": prompt}], add_generation_prompt=True)[0]


class Writer:
    """A model and its tokenizer with the options of one call, telling on stderr how long each answer took."""

    def __init__(self, model: MobileMoE, tokenizer: Tokenizer, **options) -> None:
        """`options`: max_new_tokens, temperature, top_p and seed of `generate`."""
        self.model, self.tokenizer = model, tokenizer
        self.options = {"stop_ids": tokenizer.stop_ids, **options}

    def stream(self, ids: list[int], cache: KVCache | None = None) -> list[int]:
        """Write on from `ids`, printing as soon as there are whole characters; returns the new ids."""
        reused = cache.length if cache else 0
        decode, shown = self.tokenizer.decode_stream(), ""
        new: list[int] = []
        begun = time.perf_counter()
        first = None  # when the first token was there
        for written in generate(self.model, [ids], cache=cache, **self.options):
            first = first or time.perf_counter()
            new.append(written[0])
            piece = decode(written[0])
            shown += piece
            print(piece, end="", flush=True)
        now = time.perf_counter()
        print(self.tokenizer.decode(new).removeprefix(shown))  # the beginning of a character that never came to its end
        speed = f", {len(new)} written at {(len(new) - 1) / (now - first):.1f} tokens/s" if first and new[1:] else ""
        tell(f"{len(ids) - reused} tokens read in {(first or now) - begun:.2f} s{speed}")
        return new

    def batch(self, prompts: list[list[int]]) -> list[list[int]]:
        """Write on from several prompts at once, under a progress bar; returns the new ids of each."""
        new: list[list[int]] = [[] for _ in prompts]
        begun = time.perf_counter()
        steps = generate(self.model, prompts, **self.options)
        for written in tqdm(steps, total=self.options["max_new_tokens"], unit="token", disable=None, leave=False):
            for row, token in written.items():
                new[row].append(token)
        read, total, seconds = sum(map(len, prompts)), sum(map(len, new)), time.perf_counter() - begun
        tell(f"{read} tokens read, {total} written in {seconds:.2f} s: {total / seconds:.1f} tokens/s")
        return new

    def converse(self, system: str | None) -> None:
        """Answer the lines of stdin until it ends; only what is new of the conversation is computed."""
        if isinstance(sys.stdin, io.TextIOWrapper):
            sys.stdin.reconfigure(errors="replace")  # a stray byte is no reason to stop
        tell("/reset begins anew, /quit or Ctrl-D ends")
        opening = [{"role": "system", "content": system}] if system else []
        messages = list(opening)
        seen: list[int] = []  # ids whose keys and values are in the cache
        cache = self.model.new_cache(1, self.model.config.max_position_embeddings)
        while (line := read_line()) is not None and line != "/quit":
            if line == "/reset":
                messages = list(opening)
            if not line or line == "/reset":
                continue
            turn = [*messages, {"role": "user", "content": line}]
            ids, _ = self.tokenizer.render_chat(turn, add_generation_prompt=True)
            cache.rewind(min(len(common_beginning(ids, seen)), len(ids) - 1))
            try:
                new = self.stream(ids, cache)
            except UserError as error:
                tell(f"error: {error}: /reset, or say less")
                continue
            seen = [*ids, *new][: cache.length]
            messages = [*turn, {"role": "assistant", "content": self.tokenizer.decode(new)}]


def common_beginning(first: list[int], second: list[int]) -> list[int]:
    """The ids with which both begin."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False))
    return [a for a, _ in pairs]


def read_line() -> str | None:
    """The next line of stdin, with a prompt on a terminal; None at its end."""
    if sys.stdin.isatty():
        print("> ", end="", file=sys.stderr, flush=True)
    line = sys.stdin.readline()
    return line.strip() if line else None


def tell(text: str) -> None:
    """A remark that is not part of what the model writes."""
    print(f"[{text}]", file=sys.stderr, flush=True)


def read_samples(path: Path) -> list[dict[str, str]]:
    """What earlier calls appended to `path`; nothing if it is not there yet."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: {path.parent} is not a folder")
    try:
        samples = json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None
    if not isinstance(samples, list):
        raise UserError(f"{path} holds {samples!r:.60}, not a list of samples: choose another file")
    return samples


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.generate", description="Let a model write.")
    parser.add_argument("--model", required=True, type=Path, help="release, run or checkpoint folder")
    parser.add_argument("--prompt", action="append", help="text to continue; may be repeated: one batch")
    parser.add_argument("--chat", action="store_true", help="chat format; without --prompt a conversation over stdin")
    parser.add_argument("--system", help="system message of a chat")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument(
        "--dtype", choices=("bfloat16", "float32"), default="bfloat16", help="of the weights (default: %(default)s)"
    )
    parser.add_argument("--append-to", type=Path, help="also append prompt and text to this JSON file")
    args = parser.parse_args(argv)
    for ok, message in (
        (0 <= args.temperature < math.inf, f"--temperature is {args.temperature}; it must not be negative"),
        (0 < args.top_p <= 1, f"--top-p is {args.top_p}; it must lie in (0, 1]"),
        (args.max_new_tokens >= 1, f"--max-new-tokens is {args.max_new_tokens}; it must be at least 1"),
        (0 <= args.seed < 2**62, f"--seed is {args.seed}; it must lie in 0..2^62"),
        (args.prompt or args.chat, "nothing to write about: give --prompt TEXT, or --chat for a conversation"),
        (args.chat or not args.system, "--system is a part of the chat format: add --chat"),
        (args.prompt or not args.append_to, "--append-to keeps answers to --prompt, not a conversation"),
    ):
        if not ok:
            raise UserError(message)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    tokenizer = load_tokenizer(find_tokenizer(args.model))
    samples = read_samples(args.append_to) if args.append_to else []
    prompts = [encode_prompt(tokenizer, prompt, args.chat, args.system) for prompt in args.prompt or ()]
    model = load_model(args.model, getattr(torch, args.dtype), device)
    check_vocabulary(tokenizer, model.config)
    writer = Writer(
        model,
        tokenizer,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
    )
    if not prompts:
        writer.converse(args.system)
        return 0
    if len(prompts) == 1:
        print(f"--- {args.prompt[0]}")
        texts = [tokenizer.decode(writer.stream(prompts[0]))]
    else:
        texts = [tokenizer.decode(ids) for ids in writer.batch(prompts)]
        for prompt, text in zip(args.prompt, texts, strict=True):
            print(f"--- {prompt}\n{text}\n")
    if args.append_to:
        kind = "chat" if args.chat else "continuation"
        samples += [{"prompt": p, "text": t, "kind": kind} for p, t in zip(args.prompt, texts, strict=True)]
        try:
            write_atomic(args.append_to, json.dumps(samples, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            raise UserError(f"cannot write {args.append_to}: {error.strerror or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
