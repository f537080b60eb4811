"""Let a model write: continuations of text, or answers in the chat format.

python -m mm_train.generate --model runs/quickstart/export --prompt "import os"
python -m mm_train.generate --model runs/quickstart/export --chat --prompt "What does textwrap.dedent do?"
"""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from mm_train.cli import UserError, command
from mm_train.files import write_atomic
from mm_train.model import MobileMoE
from mm_train.release import find_tokenizer, load_model
from mm_train.tokenizer import Tokenizer, load_tokenizer


@torch.no_grad()
def generate(
    model: MobileMoE,
    prompt: Sequence[int],
    max_new_tokens: int,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[int]:
    """Yield new token ids until a stop id (not yielded), `max_new_tokens`, or the end of the context.

    `temperature` 0 takes the likeliest token; otherwise sampling is from the smallest set of tokens whose
    probability reaches `top_p`. Every token recomputes its whole context: there is no key-value cache yet.
    """
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for _ in range(min(max_new_tokens, model.config.max_position_embeddings - len(ids))):
        tokens_BT = torch.tensor([ids], device=model.model.embed_tokens.weight.device)
        logits_V = model.logits(model.hidden(tokens_BT)[0, -1]).float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            probs_V, order_V = torch.softmax(logits_V / temperature, -1).sort(descending=True)
            probs_V[probs_V.cumsum(0) - probs_V >= top_p] = 0
            token = int(order_V[torch.multinomial(probs_V, 1, generator=generator)])
        if token in stop_ids:
            return
        ids.append(token)
        yield token


def write(model: MobileMoE, tokenizer: Tokenizer, prompt: str, chat: bool, **options) -> str:
    """Text that the model writes after `prompt` (or answers to it, with `chat`)."""
    if chat:
        ids, _ = tokenizer.render_chat([{"role": "user", "content": prompt}], add_generation_prompt=True)
    else:
        ids = [tokenizer.bos_id, *tokenizer.encode(prompt)]
    if len(ids) >= model.config.max_position_embeddings:
        raise UserError(f"the prompt has {len(ids)} tokens; the context holds {model.config.max_position_embeddings}")
    return tokenizer.decode(list(generate(model, ids, stop_ids=tokenizer.stop_ids, **options)))


def read_samples(path: Path) -> list[dict[str, str]]:
    """What earlier calls appended to `path`; nothing if it is not there yet."""
    try:
        return json.loads(path.read_text()) if path.exists() else []
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read {path}: {error}") from None


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.generate", description="Let a model write.")
    parser.add_argument("--model", required=True, type=Path, help="release, run or checkpoint folder")
    parser.add_argument("--prompt", required=True, action="append", help="text to continue; may be repeated")
    parser.add_argument("--chat", action="store_true", help="put the prompt into the chat format")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="default: %(default)s")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from this much probability (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling (default %(default)s)")
    parser.add_argument("--append-to", type=Path, help="also append prompt and text to this JSON file")
    args = parser.parse_args(argv)
    if args.temperature < 0 or not 0 < args.top_p <= 1 or args.max_new_tokens < 1:
        raise UserError(
            f"--temperature {args.temperature} must not be negative, --top-p {args.top_p} must lie in (0, 1] and"
            f" --max-new-tokens {args.max_new_tokens} must be at least 1"
        )
    model = load_model(args.model, device="cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = load_tokenizer(find_tokenizer(args.model))
    samples = read_samples(args.append_to) if args.append_to else []
    for prompt in args.prompt:
        text = write(
            model,
            tokenizer,
            prompt,
            args.chat,
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            seed=args.seed,
        )
        print(f"--- {prompt}\n{text}\n")
        samples.append({"prompt": prompt, "text": text, "kind": "chat" if args.chat else "continuation"})
    if args.append_to:
        try:
            write_atomic(args.append_to, json.dumps(samples, indent=1, ensure_ascii=False).encode())
        except OSError as error:
            raise UserError(f"cannot write {args.append_to}: {error.strerror or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
