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
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import tokenizers

from mm_train.cli import UserError
from mm_train.config import Model
from mm_train.files import write_atomic
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
        """Build from the bytes of a tokenizer.json, called `origin` in errors. Raises UserError if it is unusable."""
        try:
            parsed = json.loads(tokenizer_json)
            self._backend = tokenizers.Tokenizer.from_buffer(tokenizer_json)
        except Exception as error:  # the library raises bare Exception on a malformed file
            raise UserError(f"{origin} is not a readable tokenizer.json: {error}") from None
        self._backend.encode_special_tokens = True  # control strings in text stay text
        self._json = tokenizer_json
        self.sha256 = hashlib.sha256(tokenizer_json).hexdigest()
        vocab = self._backend.get_vocab(with_added_tokens=True)
        self.vocab_size = len(vocab)
        _refuse_unsuitable(parsed, vocab, origin)

        control = {token["content"]: token["id"] for token in parsed["added_tokens"]}
        self.bos_id, self.eos_id, self.pad_id = control[BOS], control[EOS], control[PAD]
        self.stop_ids = (control[EOS], control[EOT])
        self.eot_id = control[EOT]
        self._token_bytes = np.zeros(self.vocab_size, dtype=np.uint16)
        for token, index in vocab.items():
            self._token_bytes[index] = 0 if token in control else len(token)  # the alphabet has one letter per byte
        newlines = self.encode("\n\n")
        self.headers = {
            role: [control[HEADER_START], *self.encode(role), control[HEADER_END], *newlines] for role in ROLES
        }

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

    def token_bytes(self) -> np.ndarray:
        """uint16 [vocab_size]: how many bytes of UTF-8 text each id stands for, 0 for control tokens."""
        return self._token_bytes

    def tables(self) -> tuple[list[str], list[bool], list[str]]:
        """For other formats: tokens by id (byte alphabet), which of them are control tokens, merges as "left right"."""
        parsed = json.loads(self._json)
        vocab = self._backend.get_vocab(with_added_tokens=True)
        control = {token["content"] for token in parsed["added_tokens"]}
        tokens = sorted(vocab, key=vocab.__getitem__)
        pairs = (merge if isinstance(merge, str) else " ".join(merge) for merge in parsed["model"]["merges"])
        return tokens, [token in control for token in tokens], list(pairs)

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
            "ignore_merges": True,  # 678 of Llama-3's tokens cannot be reached by merges
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
    alphabet = byte_alphabet()
    vocab: dict[str, int] = {}
    for line in (folder / "llama3" / "tokenizer.model").read_bytes().splitlines():
        encoded, rank = line.split()
        vocab["".join(alphabet[byte] for byte in base64.b64decode(encoded))] = int(rank)
    # The file has ranks only. Every split of a token into two tokens becomes a merge of the token's rank: the pairs
    # that greedy merging never meets do no harm, and the pair that it does meet is among them.
    merges = []
    for token in vocab:
        pairs = [(token[:i], token[i:]) for i in range(1, len(token)) if token[:i] in vocab and token[i:] in vocab]
        merges += sorted(pairs, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return assemble(vocab, merges, LLAMA3_NUM_CONTROL)


def byte_alphabet() -> list[str]:
    """The printable letter that stands for each byte value in a byte-level vocabulary (GPT-2's table)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) if byte in printable else chr(256 + others.index(byte)) for byte in range(256)]


def _refuse_unsuitable(parsed: dict, vocab: dict[str, int], origin: str) -> None:
    """Raise UserError unless encoding is lossless, bytes can be counted and every control token is there."""
    decoder, added = parsed.get("decoder") or {}, parsed.get("added_tokens") or []
    if decoder.get("type") != "ByteLevel" or parsed.get("normalizer") is not None:
        raise UserError(f"{origin}: only byte-level tokenizers without a normalizer are supported (lossless ones)")
    missing = [name for name in (BOS, EOS, EOT, HEADER_START, HEADER_END, PAD) if name not in vocab]
    if missing:
        raise UserError(f"{origin} lacks the control token(s) {' '.join(missing)}: not a MobileMoE tokenizer")
    parsed_in_text = [token["content"] for token in added if not token.get("special")]
    if parsed_in_text:
        raise UserError(f"{origin}: added token {parsed_in_text[0]!r} is not marked special and would be found in text")
    if sorted(vocab.values()) != list(range(len(vocab))):
        raise UserError(f"{origin}: the ids of its {len(vocab)} tokens are not 0..{len(vocab) - 1}")
