"""What a GGUF file of this project says of itself: keys, tokenizer, sizes. Torch-free."""

import re
from pathlib import Path
from typing import Any, NamedTuple

from mm_train.cli import UserError
from mm_train.gguf.layout import ARCHITECTURE
from mm_train.tokenizer import Tokenizer, assemble

NO_PARAMETERS = ("attn_q_norm.weight", "attn_k_norm.weight", "exp_probs_b")  # ones; what no gradient moves
CONTROL = re.compile(r"<\|.*\|>|\[unused\d+\]")  # after the ordinary tokens


class Facts(NamedTuple):
    """What is known of a model without loading it."""

    path: Path
    keys: dict[str, Any]  # all but the tokenizer's
    tokens: list[str]
    merges: list[str]
    tensor_bytes: dict[str, int]
    parameters: int

    @property
    def name(self) -> str:
        return str(self.keys.get("general.name") or self.path.stem)

    @property
    def context(self) -> int:
        """Tokens that it was made for."""
        return int(self.keys[f"{ARCHITECTURE}.context_length"])

    @property
    def quantised(self) -> bool:
        """Are weights int4? Else they are float32."""
        return bool(self.keys.get("general.file_type"))

    def tokenizer(self) -> Tokenizer:
        """The tokenizer it was written with."""
        ordinary = [token for token in self.tokens if not CONTROL.fullmatch(token)]
        vocab = {token: index for index, token in enumerate(ordinary)}
        controls = sum(token.startswith("<|") for token in self.tokens[len(ordinary) :])
        pairs = [(left, right) for left, right in (merge.split(" ") for merge in self.merges)]
        return assemble(vocab, pairs, controls)

    def numbers(self) -> dict[str, int]:
        """Bytes: of the file, of the weights a token meets, and of keys and values (float16) for a token of context."""
        key = self.keys.get
        experts, chosen = key(f"{ARCHITECTURE}.expert_count") or 0, key(f"{ARCHITECTURE}.expert_used_count") or 0
        active = sum(size * chosen // experts if "_exps." in name else size for name, size in self.tensor_bytes.items())
        heads, width = (self.keys[f"{ARCHITECTURE}.attention.{part}"] for part in ("head_count_kv", "key_length"))
        cache = 2 * 2 * heads * width * self.keys[f"{ARCHITECTURE}.block_count"]
        return {"file_bytes": self.path.stat().st_size, "active_bytes": active, "kv_bytes": cache}


def read_model(path: Path) -> Facts:
    """Read a file's keys and headers. Raises UserError where it is no GGUF of this project."""
    reader = open_file(path)
    fields = reader.fields
    facts = {key: field.contents() for key, field in fields.items() if not key.startswith("tokenizer.")}
    if facts.get("general.architecture") != ARCHITECTURE:
        raise UserError(f"{path} is of architecture {facts.get('general.architecture')!r}, not {ARCHITECTURE!r}")
    try:
        tokens, merges = (fields[f"tokenizer.ggml.{part}"].contents() for part in ("tokens", "merges"))
    except KeyError as error:
        raise UserError(f"{path} lacks the key {error.args[0]}") from None
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    parameters = sum(int(t.n_elements) for t in reader.tensors if not t.name.endswith(NO_PARAMETERS))
    return Facts(path, facts, tokens, merges, sizes, parameters)


def library() -> Any:
    """The package gguf. Raises UserError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise UserError("GGUF files need the package gguf: pip install 'mobilemoe-train[device]'") from None
    return gguf


def open_file(path: Path) -> Any:
    """gguf's reader of a file. Raises UserError where there is none."""
    gguf = library()
    if not path.is_file():
        raise UserError(f"GGUF file not found: {path}")
    try:
        return gguf.GGUFReader(path)
    except Exception as error:  # the library raises whatever comes of malformed bytes
        raise UserError(f"{path} is not a readable GGUF file: {error}") from None
