"""Tokenising at the speed of the fastest library that is exact, which is shown at start-up rather than assumed.

`fastokens` is a rewrite of byte-level BPE and `tiktoken` what Llama 3's vocabulary was made for; `tokenizers` reads any
tokenizer.json. Each is told that control strings in text are text, which is among the things that are compared.
"""

import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import BrokenExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mm_train.tokenizer import CONTROL_TOKENS, SPLIT_REGEX, Tokenizer, load_tokenizer

Flat = tuple[np.ndarray, np.ndarray]  # ids of all texts, uint32; where each begins, and the end
Encode = Callable[[Sequence[str]], Flat]

PROBES = (  # where implementations of byte-level BPE have been seen to differ
    *CONTROL_TOKENS,
    "<|eot|>assistant<|header_end|>\n\nNo. <|begin_of_text|><|end_of_text|>",
    "<|reserved_special_token_0|> <|python_tag|> <s> </s> [INST] <|im_start|>user",
    *("", " ", "  ", "\n", "\r\n", "\r", "\t\t", " \n \n ", "a  b   c    d", "x\n\n\n  y"),
    "\u00a0\u2003\u3000 \u0085\u2028x",
    "I'll we'Ve YOU'RE it's don't 's'S'ſ ’s o'clock'd",
    "1 12 123 1234 12345 0x1F 3.14159 1,000,000 ½ ² ٣٤٥ १२३ 𝟘𝟙𝟚 ①②③",
    "naïve café Å Å ﬁ ŉ ǰ ΐ İı ẞß Straße ΣΊΣΥΦΟΣ",
    "日本語の文章。中文字符，没有空格。한국어 문장입니다 ไทยไม่มีช่องว่าง हिन्दी العربية עברית",
    "👍🏽👩‍👩‍👧‍👦🇩🇪🏴󠁧󠁢󠁥󠁮󠁧󠁿 e\u0301\u0323 \u200b\u200d\ufeff \ufffd \U0010ffff \x00\x01\x7f",
    "def f(x):\n\treturn {\n\t\t'a': [x ** 2 for _ in range(10)],  # ...\n\t}\n" * 3,
    "</div></span>\n;;;;----====////\\\\\\\\!!!???...,,,{{{}}}((()))[[[]]]\n\n\n",
    "https://example.org/a?b=c&d=%20#e user@example.org C:\\path\\to\\file",
    "a" * 3000,
    " " * 3000 + "x",
    "\n" * 1000,
    "ab" * 1500 + " " + "é" * 1000 + "0" * 1000,
    "".join(chr(code) for code in range(1, 0x3000)),
    "".join(chr(code) for code in range(0x1F000, 0x1FAFF)),
)


@dataclass(frozen=True)
class Engine:
    """Which library tokenises with the tokenizer.json in `folder`."""

    library: str  # fastokens | tiktoken | tokenizers
    folder: Path
    sha256: str

    def load(self) -> Encode:
        """The function that tokenises, made once in each process; a process that is forked has it already."""
        return _load(self)


def reference(tokenizer: Tokenizer, folder: Path) -> tuple[Engine, Encode]:
    """The library that says what is right for a tokenizer that is saved in `folder`, and its function.

    It is tiktoken for Llama 3's vocabulary and tokenizers for others. What `tokenizer` has read is not read again.
    """
    if tokenizer.vocab_size == 128256 and _installed("tiktoken"):
        return Engine("tiktoken", folder, tokenizer.sha256), _tiktoken(tokenizer)
    return Engine("tokenizers", folder, tokenizer.sha256), _tokenizers(tokenizer)


def choose_engine(
    tokenizer: Tokenizer, folder: Path, truth: tuple[Engine, Encode], call: Callable[..., bool]
) -> tuple[Engine, str]:
    """The fastest library that is exact for the tokenizer saved in `folder`, and a line that says what was compared.

    `truth` is the `reference`. Compared are PROBES and every token of the vocabulary that is text, among them those
    that merging cannot reach (588 in Llama 3's). fastokens is loaded here, for processes that are forked later, and
    starts threads when it is used, which do not outlive a fork: `call` calls a function in such a process.
    """
    right, encode = truth
    if not _installed("fastokens"):
        return right, f"tokenising with {_version(right.library)} (fastokens is faster, where installed)"
    fast = Engine("fastokens", folder, tokenizer.sha256)
    probes = [*PROBES, *vocabulary_texts(tokenizer.ordinary_tokens)]
    expected = encode(probes)
    compared = f"{right.library} on {len(expected[0]):,} tokens"
    try:
        fast.load()
        if call(gives, fast, probes, expected):
            return fast, f"tokenising with {_version('fastokens')}: equal to {compared}"
        why = f"differs from {compared}"
    except BrokenExecutor:
        raise
    except Exception as error:  # whatever it raises on a tokenizer.json that it cannot read
        why = f"cannot be used: {error}"
    return right, f"tokenising with {_version(right.library)}: {_version('fastokens')} {why}"


def gives(engine: Engine, texts: Sequence[str], expected: Flat) -> bool:
    """Whether a library gives the ids that are expected for each text."""
    return same(engine.load()(texts), expected)


def vocabulary_texts(tokens: Iterable[bytes]) -> list[str]:
    """Every one of `tokens` that is text by itself, a line each, some hundreds to a text.

    The line ends keep words apart, so that a word that is one token is looked up as a whole. Tokens that do not end
    in a letter or digit, which would take the line end in, are texts by themselves.
    """
    texts = []
    for token in tokens:
        try:
            texts.append(token.decode())
        except UnicodeDecodeError:
            continue
    alone = [text for text in texts if not text[-1].isalnum()]
    return [*alone, *("\n".join(texts[i : i + 500]) for i in range(0, len(texts), 500))]


def same(one: Flat, other: Flat) -> bool:
    """Whether two libraries gave the same ids for each text."""
    return np.array_equal(one[0], other[0]) and np.array_equal(one[1], other[1])


@functools.lru_cache(maxsize=4)
def _load(engine: Engine) -> Encode:
    if engine.library == "fastokens":
        return _fastokens(engine.folder)
    return {"tiktoken": _tiktoken, "tokenizers": _tokenizers}[engine.library](load_tokenizer(engine.folder))


def _fastokens(folder: Path) -> Encode:
    import fastokens

    backend = fastokens._native.Tokenizer.from_file(str(folder / "tokenizer.json"))

    def encode(texts: Sequence[str]) -> Flat:
        ids, borders = backend.encode_batch_flat(list(texts), add_special_tokens=False, split_special_tokens=True)
        return np.frombuffer(ids, dtype="<u4"), np.frombuffer(borders, dtype="<u8").astype(np.int64)

    return encode


def _tiktoken(tokenizer: Tokenizer) -> Encode:
    import tiktoken

    ranks = tokenizer.ordinary_tokens
    encoding = tiktoken.Encoding("data_prep", pat_str=SPLIT_REGEX, mergeable_ranks=ranks, special_tokens={})
    return lambda texts: _flat([encoding.encode_ordinary(text) for text in texts])


def _tokenizers(tokenizer: Tokenizer) -> Encode:
    return lambda texts: _flat(tokenizer.encode_batch(list(texts)))


def _flat(ids: list[list[int]]) -> Flat:
    joined = np.array([index for text in ids for index in text], dtype=np.uint32)
    return joined, np.cumsum([0, *map(len, ids)])


def _installed(name: str) -> bool:
    return importlib.util.find_spec(name) is not None


def _version(name: str) -> str:
    return f"{name} {importlib.metadata.version(name)}"
