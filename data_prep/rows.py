"""A row of a corpus as a document: a text, a conversation, or a prompt with its response."""

import json
from collections.abc import Sequence
from typing import Any

from data_prep.config import SourceConfig
from data_prep.documents import Document, Unusable
from data_prep.formats import Row
from mm_train.tokenizer import ROLES

ROLE_NAMES = {  # what other formats call them
    **{role: role for role in ROLES},
    "human": "user",
    "gpt": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "function": "tool",
    "ipython": "tool",
}
PLACEHOLDERS = ("", "-")  # in place of a question that a data set may not pass on


def columns(source: SourceConfig) -> list[str]:
    """The columns of which a row needs one (or both, for prompt and response), the one to prefer first."""
    if source.prompt:
        names = [source.system, source.prompt, source.response]
    else:
        names = [source.column] if source.column else ["messages", "text"]
    return list(dict.fromkeys(name.split(".")[0] for name in names if name))


def to_document(row: Row, source: SourceConfig) -> Document | Unusable:
    """The document in a row, or why it has none: no column, no prompt, unknown role, undecodable, malformed row."""
    try:
        document = _document(row, source)
        if isinstance(document, Document):
            _ = document.num_bytes  # JSON can spell lone surrogates, which have no UTF-8
    except UnicodeEncodeError:
        return Unusable("undecodable", _size(row))
    except (ValueError, TypeError, KeyError, AttributeError):
        return Unusable("malformed row", _size(row))
    return document


def _document(row: Row, source: SourceConfig) -> Document | Unusable:
    if source.prompt:
        turns = [("system", source.system), ("user", source.prompt), ("assistant", source.response)]
        contents = {role: _get(row, name) for role, name in turns if name}
        prompt = contents["user"]
        if prompt is None or contents["assistant"] is None:
            return Unusable("no column", _size(row))
        if isinstance(prompt, str) and prompt.strip() in PLACEHOLDERS:
            return Unusable("no prompt", _size(row))
        system = [{"role": "system", "content": _text(contents["system"])}] if contents.get("system") else []
        asked = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return _conversation(row, [*system, *asked, {"role": "assistant", "content": contents["assistant"]}])
    names = [source.column] if source.column else ["messages", "text"]
    value = next((found for name in names if (found := _get(row, name)) is not None), None)
    if value is None:
        return Unusable("no column", _size(row))
    if isinstance(value, str):
        return Document(value)
    return _conversation(row, value)


def _conversation(row: Row, turns: Sequence[dict[str, Any]]) -> Document | Unusable:
    messages = _messages(turns)
    return Document(messages=messages) if messages is not None else Unusable("unknown role", _size(row))


def _messages(turns: Sequence[dict[str, Any]]) -> tuple[dict[str, str], ...] | None:
    """Turns as {"role", "content"}, from that or from ShareGPT's {"from", "value"}; None for an unknown role."""
    messages = []
    for turn in turns:
        role, content = (turn["role"], turn["content"]) if "role" in turn else (turn["from"], turn["value"])
        if role not in ROLE_NAMES:
            return None
        messages.append({"role": ROLE_NAMES[role], "content": _text(content)})
    return tuple(messages)


def _get(row: Row, name: str) -> Any:
    """The value at a dotted path."""
    value: Any = row
    for part in name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r:.40} is no text")
    return value


def _size(row: Row) -> int:
    return len(json.dumps(row, default=str))
