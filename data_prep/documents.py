"""What a corpus is made of: documents, and what turned out to be none."""

from dataclasses import dataclass
from functools import cached_property


@dataclass(frozen=True)
class Document:
    """A text, or a conversation as [{"role", "content"}].

    `key` decides between training and validation: documents with one key stay together, in every source. "" stands
    for a document of its own.
    """

    text: str = ""
    messages: tuple[dict[str, str], ...] = ()
    key: str = ""

    @cached_property
    def num_bytes(self) -> int:
        """UTF-8 bytes of the text, or of the contents of the messages."""
        return sum(len(part) if part.isascii() else len(part.encode()) for part in self.parts)

    @property
    def parts(self) -> tuple[str, ...]:
        """The text, or the contents of the messages."""
        return tuple(message["content"] for message in self.messages) or (self.text,)


@dataclass(frozen=True)
class Unusable:
    """Something that is no document, and why: it is counted like every other drop."""

    reason: str
    num_bytes: int
