"""What is asked of a model, as token ids, by lm-eval's conventions for where a context ends and what is cut off.

A context begins with the special tokens that the tokenizer puts there (BOS). What does not fit into the model's context
is cut on the left, BOS included, as lm-eval does.
"""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

ENCODE_CHUNK = 1024  # texts encoded at once: bounds the memory of Python's lists of ids
MAX_NEW_TOKENS = 256  # lm-eval's default


class Codec(Protocol):
    """A tokenizer, as far as it is needed here."""

    eos_text: str
    stop_ids: tuple[int, ...]
    sha256: str

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, with what the model expects at the beginning."""

    def encode_alone(self, text: str) -> list[int]:
        """Ids of a text without anything at its beginning."""

    @property
    def first(self) -> list[int]:
        """What stands for an empty context."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, special tokens left out."""


class Request(Protocol):
    """lm-eval's Instance, as far as it is read here."""

    request_type: str
    args: tuple[Any, ...]  # (context, continuation) | (context, options of generation)


@dataclass(frozen=True)
class Scored:
    """A sequence whose last `num_targets` ids are scored. `group`: sequences of one document have the same."""

    ids: np.ndarray  # int32
    num_targets: int
    group: int
    cut: bool

    @property
    def inputs(self) -> np.ndarray:
        """What the model reads: the last id is only predicted."""
        return self.ids[:-1]

    @property
    def key(self) -> str:
        """Hash of what is asked: equal ones have equal answers."""
        return _hash(b"score", self.ids, self.num_targets)


@dataclass(frozen=True)
class Prompt:
    """A text to be continued greedily until one of `stops` appears, or for `max_new` tokens.

    `shortened`: the model's context has no room for what the benchmark asks, and `max_new` is less.
    """

    ids: np.ndarray  # int32
    stops: tuple[str, ...]
    max_new: int
    group: int
    cut: bool
    shortened: bool = False

    @property
    def inputs(self) -> np.ndarray:
        """What the model reads at first."""
        return self.ids

    @property
    def key(self) -> str:
        """Hash of what is asked: equal ones have equal answers."""
        return _hash(b"write", self.ids, self.stops, self.max_new)


def _hash(kind: bytes, ids: np.ndarray, *rest: object) -> str:
    return hashlib.sha256(kind + ids.tobytes() + repr(rest).encode()).hexdigest()[:32]


def encode(requests: Sequence[tuple[int, Request]], codec: Codec, context: int) -> list[Scored | Prompt]:
    """Requests with the number of their document, as ids. Raises ValueError for an empty continuation."""
    found: list[Scored | Prompt] = []
    for start in range(0, len(requests), ENCODE_CHUNK):
        chunk = requests[start:][:ENCODE_CHUNK]
        texts = dict.fromkeys(text for _, request in chunk for text in _texts(request))
        ids = dict(zip(texts, codec.encode_batch(list(texts)), strict=True))
        for group, request in chunk:
            if request.request_type == "generate_until":
                found.append(_prompt(group, request, ids, codec, context))
            else:
                found.append(_scored(group, request, ids.__getitem__, codec, context))
    return found


def _texts(request: Request) -> list[str]:
    """What has to be encoded: the whole as well, because tokens need not end where the context does."""
    if request.request_type == "generate_until":
        return [request.args[0]]
    context, continuation = request.args
    # Spaces at the end of the context belong to the continuation.
    return [context.rstrip(), context + continuation] if context.rstrip() else []


def _scored(group: int, request: Request, ids: Callable[[str], list[int]], codec: Codec, context: int) -> Scored:
    before, continuation = request.args
    if before.rstrip():
        head = ids(before.rstrip())
        tail = ids(before + continuation)[len(head) :]
    else:
        head, tail = codec.first, codec.encode_alone(before + continuation)
    if not tail:
        raise ValueError(f"no token to score after the context {before[-80:]!r} in {continuation[-80:]!r}")
    whole = np.array([*head, *tail], dtype=np.int32)
    kept = whole[-(context + 1) :]
    return Scored(kept, min(len(tail), len(kept) - 1), group, len(kept) < len(whole))


def _prompt(group: int, request: Request, ids: dict[str, list[int]], codec: Codec, context: int) -> Prompt:
    text, options = request.args
    asked = next((options[name] for name in ("max_gen_toks", "max_new_tokens", "max_tokens") if name in options), None)
    wanted = MAX_NEW_TOKENS if asked is None else int(asked)
    max_new = min(wanted, context // 2) if wanted >= context else wanted
    whole = np.array(ids[text], dtype=np.int32)
    kept = whole[-(context - max_new) :]
    until = options.get("until") or []
    stops = tuple(dict.fromkeys(s for s in [*([until] if isinstance(until, str) else until), codec.eos_text] if s))
    return Prompt(kept, stops, max_new, group, len(kept) < len(whole), max_new < wanted)


def finish(text: str, stops: Sequence[str]) -> str:
    """A written text up to the first stop in it."""
    for stop in stops:
        text = text.split(stop)[0]
    return text
