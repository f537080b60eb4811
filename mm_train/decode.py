"""Decoding: tokens out of a model, several prompts at a time, greedily or by sampling.

Shapes: B rows, T columns, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from mm_train.cli import UserError
from mm_train.kv_cache import KVCache
from mm_train.model import MobileMoE

NUCLEUS = 1024  # likeliest tokens looked at first: sorting a whole vocabulary costs more than a layer


@torch.inference_mode()
def generate(
    model: MobileMoE,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    *,
    stop_ids: Sequence[int] = (),
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    cache: KVCache | None = None,
    prefix: KVCache | None = None,
    ended: Callable[[int, int], bool] | None = None,
) -> Iterator[dict[int, int]]:
    """Write on from several prompts at once. Each step yields {number of the prompt: its next token id}.

    A row ends at a stop id (not yielded), after `max_new_tokens`, or at the end of the context. Shorter prompts are
    padded on the left, which changes nothing; but rounding depends on the number of rows, most of all with 16-bit
    weights on a CPU (kernels.linear), and may tip the balance between two tokens. `temperature` 0 takes the likeliest
    token; otherwise sampling is from the smallest set of tokens whose probability reaches `top_p`; row k draws from a
    random stream of its own, seeded `seed` + k. `cache` (one prompt only) holds keys and values of the prompt's
    beginning, of fewer tokens than the prompt; it is filled further. `prefix` holds those that all prompts begin with,
    in one row, fewer tokens than the shortest has; it stays as it is. `ended(row, token)` is told of every token, and
    ends the row by saying so. Raises UserError for an empty prompt and for one that fills the context.
    """
    context = model.config.max_position_embeddings
    for prompt in prompts:
        if not 0 < len(prompt) < context:
            raise UserError(f"the prompt has {len(prompt)} tokens; it needs one, and the context holds {context}")
    longest = max(map(len, prompts))
    padding = [longest - len(prompt) for prompt in prompts]
    budgets = [min(max_new_tokens, context - len(prompt)) for prompt in prompts]
    if cache is None:
        known = 0 if prefix is None else prefix.length
        cache = model.new_cache(len(prompts), longest - known + max(budgets), padding)
        if prefix is not None:
            cache.begin_with(prefix)
    device = model.model.embed_tokens.weight.device
    pick = _picker(temperature, top_p, [torch.Generator().manual_seed(seed + row) for row in range(len(prompts))])
    known = cache.length
    padded = [[0] * pad + list(prompt[known:]) for pad, prompt in zip(padding, prompts, strict=True)]
    tokens_BT = torch.tensor(padded, device=device)
    rows = list(range(len(prompts)))  # which prompts are still being written; their rows in the cache
    for step in range(1, max(budgets) + 1):
        logits_BV = model.logits(model.hidden(tokens_BT, cache)[:, -1])
        tokens = pick(logits_BV, rows)
        written = {row: token for row, token in zip(rows, tokens, strict=True) if token not in stop_ids}
        if written:
            yield written
        over = {row for row, token in written.items() if ended and ended(row, token)}
        going = [i for i, row in enumerate(rows) if row in written and row not in over and step < budgets[row]]
        if not going:
            return
        if len(going) < len(rows):
            rows = [rows[i] for i in cache.keep_rows(going)]
        tokens_BT = torch.tensor([[written[row]] for row in rows], device=device)


def _picker(
    temperature: float, top_p: float, generators: list[torch.Generator]
) -> Callable[[Tensor, list[int]], list[int]]:
    """A function from logits_BV and the numbers of their rows to one token a row."""

    def sample(logits_V: Tensor, generator: torch.Generator) -> int:
        probs_V = torch.softmax((logits_V - logits_V.max()) / temperature, -1)  # finite at any temperature
        if top_p >= 1:
            return int(torch.multinomial(probs_V, 1, generator=generator))
        best, ids = probs_V.topk(min(NUCLEUS, len(probs_V)))
        if float(best.sum()) < top_p:
            best, ids = probs_V.sort(descending=True)
        outside = best.cumsum(0) - best >= top_p  # never the likeliest
        return int(ids[torch.multinomial(best.masked_fill(outside, 0), 1, generator=generator)])

    def pick(logits_BV: Tensor, rows: list[int]) -> list[int]:
        if temperature == 0:
            return logits_BV.argmax(-1).tolist()
        return [sample(logits, generators[row]) for logits, row in zip(logits_BV.float().cpu(), rows, strict=True)]

    return pick
