"""The tokenizer: byte-level BPE with the MobileMoE control tokens and chat format. Torch-free.

One backend, the `tokenizers` library, for both vocabularies: Llama-3's (converted from the installed `llama-models`
wheel, never shipped with this project) and small ones trained by data_prep. Text is always ordinary: a control string
such as "<|eot|>" inside a document is encoded as the characters it is made of. Control tokens enter a sequence only by
id, from `render_chat` or from code that asks for `bos_id` and its like.
"""

import base64
import hashlib
import importlib.util
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path

import numpy as np
import tokenizers

from mm_train.cli import UserError, first_line
from mm_train.config import Model
from mm_train.files import write_atomic
from mm_train.manifest import no_garbage_collection
from mm_train.remote import is_url, read_file

# Splits text into words before the merges; Llama-3's, also used for the small vocabularies.
SPLIT_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

BOS, EOS, EOT, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|eot|>", "<|finetune_right_pad|>"
HEADER_START, HEADER_END = "<|header_start|>", "<|header_end|>"
ROLES = ("system", "user", "assistant", "tool")

# Control token number k has id (number of ordinary tokens + k) in every vocabulary: the Llama-4 names and offsets.
CONTROL_TOKENS = (
    BOS,
    EOS,
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    HEADER_START,
    HEADER_END,
    "<|eom|>",
    EOT,
    "<|step|>",
    *(f"<|text_post_train_reserved_special_token_{i}|>" for i in range(6)),
    "<|python_start|>",
    "<|python_end|>",
    PAD,
)
LLAMA3_NUM_CONTROL = 256

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|header_start|>{{ message['role'] }}<|header_end|>\n\n{{ message['content'] }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|header_start|>assistant<|header_end|>\n\n{% endif %}"
)


class Tokenizer:
    """A byte-level BPE vocabulary with control tokens.

    Attributes: `vocab_size` (control tokens included), `bos_id`, `eos_id`, `pad_id`, `eot_id` (ends a message),
    `stop_ids` (either ends an answer), `headers` (ids before the message of each role), `sha256` (of the bytes of its
    tokenizer.json: two data sets fit together when these are equal).
    """

    def __init__(self, tokenizer_json: bytes, origin: str = "tokenizer.json"):
        """Build from the bytes of a tokenizer.json, called `origin` in errors. Raises UserError if it is unusable.

        The library reads the file when it is first needed, which is the larger part of the work: a vocabulary of
        128,256 tokens takes it half a second, and whoever asks for ids and sizes only never needs it.
        """
        try:
            with no_garbage_collection():  # hundreds of thousands of merges, all of which stay
                parsed = json.loads(tokenizer_json)
            control = {token["content"]: int(token["id"]) for token in parsed.get("added_tokens") or []}
            vocab = {str(token): int(index) for token, index in parsed["model"]["vocab"].items()} | control
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise UserError(f"{origin} is not a readable tokenizer.json: {error!r:.200}") from None
        _refuse_unsuitable(parsed, vocab, control, origin)
        self._json, self._origin, self._control = tokenizer_json, origin, control
        self._tokens = sorted(vocab, key=vocab.__getitem__)
        self.sha256 = hashlib.sha256(tokenizer_json).hexdigest()
        self.vocab_size = len(vocab)
        self.bos_id, self.eos_id, self.pad_id, self.eot_id = (control[name] for name in (BOS, EOS, PAD, EOT))
        self.stop_ids = (self.eos_id, self.eot_id)

    @cached_property
    def _backend(self) -> tokenizers.Tokenizer:
        try:
            backend = tokenizers.Tokenizer.from_buffer(self._json)
        except Exception as error:  # the library raises bare Exception on a malformed file
            raise UserError(f"{self._origin} is not a readable tokenizer.json: {first_line(error)}") from None
        moved = [name for name, index in self._control.items() if backend.token_to_id(name) != index]
        if moved:
            raise UserError(
                f"{self._origin}: the id of {moved[0]!r} is not the one that its place in the list gives it"
            )
        backend.encode_special_tokens = True  # control strings in text stay text
        return backend

    @cached_property
    def headers(self) -> dict[str, list[int]]:
        """Ids before the message of each role."""
        return self.headers_by(self.encode)

    def headers_by(self, encode: Callable[[str], list[int]]) -> dict[str, list[int]]:
        """`headers`, their text encoded by a function that does what `encode` does."""
        begin, end, newlines = self._control[HEADER_START], self._control[HEADER_END], encode("\n\n")
        return {role: [begin, *encode(role), end, *newlines] for role in ROLES}

    def encode(self, text: str) -> list[int]:
        """Ids of ordinary text. No BOS or EOS is added, control strings are not parsed."""
        return self.encode_batch([text])[0]  # the batch call is the faster one: it leaves out character offsets

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """`encode` for many texts, on all cores of this process (TOKENIZERS_PARALLELISM=false: on one)."""
        return [item.ids for item in self._backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: Sequence[int], skip_special: bool = True) -> str:
        """The text of `ids`, exact to the byte where they are whole UTF-8; control tokens are left out or spelt out."""
        return self._backend.decode(list(ids), skip_special_tokens=skip_special)

    def decode_stream(self) -> Callable[[int], str]:
        """A function from the next id of a text to what can be shown of it: "" until a character is whole."""
        stream = tokenizers.decoders.DecodeStream(skip_special_tokens=True)
        return lambda index: stream.step(self._backend, index) or ""

    @cached_property
    def _token_bytes(self) -> np.ndarray:
        sizes = [0 if token in self._control else len(token) for token in self._tokens]
        return np.array(sizes, dtype=np.uint16)  # the alphabet has one letter per byte

    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: how many bytes of UTF-8 text each id stands for, 0 for control tokens."""
        return self._token_bytes

    def tables(self) -> tuple[list[str], list[bool], list[str]]:
        """For other formats: tokens by id (byte alphabet), which of them are control tokens, merges as "left right"."""
        merges = json.loads(self._json)["model"]["merges"]
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in merges)
        return list(self._tokens), [token in self._control for token in self._tokens], list(pairs)

    @cached_property
    def ordinary_tokens(self) -> dict[bytes, int]:
        """Bytes -> id of every token that is no control token, in the order of ids."""
        ordinary = [index for index, size in enumerate(self._token_bytes.tolist()) if size]
        letters = "".join([self._tokens[index] for index in ordinary])
        byte_of = np.zeros(512, dtype=np.uint8)
        byte_of[[ord(letter) for letter in byte_alphabet()]] = range(256)
        data = byte_of[np.frombuffer(letters.encode("utf-32-le"), dtype="<u4")].tobytes()
        ends = np.cumsum(self._token_bytes[ordinary], dtype=np.int64).tolist()
        return {data[begin:end]: index for index, begin, end in zip(ordinary, [0, *ends], ends, strict=False)}

    def render_chat(
        self, messages: Iterable[dict[str, str]], add_generation_prompt: bool = False
    ) -> tuple[list[int], list[bool]]:
        """Ids of a conversation, BOS included, and which of them are trained on.

        The mask is True on the content of assistant messages and on the <|eot|> that ends them. Content is encoded on
        its own, as at inference, so the ids of a conversation always begin with those of its prompt. Raises UserError
        for a message without role or content, or with an unknown role.
        """
        ids, mask = [self.bos_id], [False]
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ROLES or not isinstance(content, str):
                raise UserError(
                    f"a chat message needs a role out of {', '.join(ROLES)} and a text content, not {message!r:.200}"
                )
            header = self.headers[role]
            body = [*self.encode(content), self.eot_id]
            ids += header + body
            mask += [False] * len(header) + [role == "assistant"] * len(body)
        if add_generation_prompt:
            header = self.headers["assistant"]
            ids += header
            mask += [False] * len(header)
        return ids, mask

    def save(self, folder: Path) -> None:
        """Write tokenizer.json and tokenizer_config.json into `folder`; transformers' AutoTokenizer reads them."""
        config = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BOS,
            "eos_token": EOS,
            "pad_token": PAD,
            "clean_up_tokenization_spaces": False,
            "chat_template": CHAT_TEMPLATE,
        }
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "tokenizer_config.json", (json.dumps(config, indent=2) + "\n").encode())
        write_atomic(folder / "tokenizer.json", self._json)


def check_vocabulary(tokenizer: Tokenizer, model: Model) -> None:
    """Raise UserError when a tokenizer has ids that a model has no row for."""
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(f"model.vocab_size ({model.vocab_size}) is below the tokenizer's {tokenizer.vocab_size}")


def load_tokenizer(spec: str | Path) -> Tokenizer:
    """Load a tokenizer from a folder (here or behind a URL), a tokenizer.json file, or the word "llama3".

    Raises UserError when there is none, when it is damaged, or when it lacks the control tokens.
    """
    if str(spec) == "llama3":
        return _load_llama3()
    if is_url(spec):
        url = f"{str(spec).rstrip('/')}/tokenizer.json"
        return Tokenizer(read_file(url), origin=url)
    path = Path(spec)
    file = path / "tokenizer.json" if path.is_dir() else path
    if not file.is_file():
        raise UserError(
            f"no tokenizer at {spec}: expected a folder with tokenizer.json, such a file, or the word llama3"
        )
    return Tokenizer(file.read_bytes(), origin=str(file))


def assemble(vocab: dict[str, int], merges: list[tuple[str, str]], num_control: int = len(CONTROL_TOKENS)) -> Tokenizer:
    """A tokenizer from ordinary tokens (byte-level alphabet, ids 0..n-1) and merges; control tokens come last."""
    names = list(CONTROL_TOKENS)
    names += [f"<|text_post_train_reserved_special_token_{i + 8}|>" for i in range(num_control - len(names))]
    control = {name: len(vocab) + i for i, name in enumerate(names)}
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
    split = {"type": "Split", "pattern": {"Regex": SPLIT_REGEX}, "behavior": "Isolated", "invert": False}
    bos = {"SpecialToken": {"id": BOS, "type_id": 0}}
    first, second = {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}
    description = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": name, **flags} for name, index in control.items()],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [split, byte_level]},
        # Only for other programs: AutoTokenizer puts BOS before a text. `encode` above never runs it.
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [bos, first],
            "pair": [bos, first, second],
            "special_tokens": {BOS: {"id": BOS, "ids": [control[BOS]], "tokens": [BOS]}},
        },
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": True,  # 588 of Llama-3's tokens cannot be reached by merges
            "vocab": vocab,
            "merges": merges,
        },
    }
    return Tokenizer(json.dumps(description, ensure_ascii=False, separators=(",", ":")).encode())


def _load_llama3() -> Tokenizer:
    """Llama-3's 128000 tokens out of the `llama-models` wheel, with 256 control tokens."""
    found = importlib.util.find_spec("llama_models")
    folder = Path(found.origin).parent if found and found.origin else None
    if folder is None or not (folder / "llama3" / "tokenizer.model").is_file():
        raise UserError(
            "the llama3 tokenizer needs the llama-models package (Llama 3 Community License), which is not installed: "
            "pip install --no-deps llama-models"
        )
    ranks = {}
    for line in (folder / "llama3" / "tokenizer.model").read_bytes().splitlines():
        encoded, rank = line.split()
        ranks[base64.b64decode(encoded)] = int(rank)
    alphabet = byte_alphabet()
    spelt = {token: "".join([alphabet[byte] for byte in token]) for token in ranks}
    pairs = (last_merge(token, ranks) for token in ranks)
    return assemble(
        {spelt[token]: rank for token, rank in ranks.items()},
        [(spelt[one], spelt[other]) for one, other in filter(None, pairs)],
        LLAMA3_NUM_CONTROL,
    )


def last_merge(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes] | None:
    """The two tokens that `token` is made of where byte pairs are merged by the rank of what they make.

    None for a single byte, and for a token that merging does not reach. No other pair ever becomes `token`: within
    it, and wherever it stands in a text, the same merges happen in the same order.
    """
    parts = [token[i : i + 1] for i in range(len(token))]
    made = [ranks.get(token[i : i + 2], len(ranks)) for i in range(len(token) - 1)]  # rank of each part and the next
    while len(parts) > 2:
        lowest = min(made)
        if lowest == len(ranks):
            return None
        i = made.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
        del made[i]
        for j in range(max(0, i - 1), min(i + 1, len(made))):
            made[j] = ranks.get(parts[j] + parts[j + 1], len(ranks))
    return (parts[0], parts[1]) if len(parts) == 2 else None


def byte_alphabet() -> list[str]:
    """The printable letter that stands for each byte value in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _refuse_unsuitable(parsed: dict, vocab: dict[str, int], control: dict[str, int], origin: str) -> None:
    """Raise UserError unless encoding is lossless, bytes can be counted and every control token is there."""
    decoder, added = parsed.get("decoder") or {}, parsed.get("added_tokens") or []
    if decoder.get("type") != "ByteLevel" or parsed.get("normalizer") is not None:
        raise UserError(f"{origin}: only byte-level tokenizers without a normalizer are supported (lossless ones)")
    missing = [name for name in (BOS, EOS, EOT, HEADER_START, HEADER_END, PAD) if name not in control]
    if missing:
        raise UserError(f"{origin} lacks the control token(s) {' '.join(missing)}: not a MobileMoE tokenizer")
    parsed_in_text = [token["content"] for token in added if not token.get("special")]
    if parsed_in_text:
        raise UserError(f"{origin}: added token {parsed_in_text[0]!r} is not marked special and would be found in text")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{origin}: the ids of its {len(vocab)} tokens are not 0..{len(vocab) - 1}")
