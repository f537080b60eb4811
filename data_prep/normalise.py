"""Small repairs of text, each of which a source asks for by name. None changes what a reader would see."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import replace

from data_prep.documents import Document

CONTROL = re.compile(r"[\x00-\x08\x0b\x0e-\x1f\x7f\ufeff\ufffe\uffff]")
LINE_ENDS = re.compile(r"[ \t]+$", re.MULTILINE)


def normalise(document: Document, steps: Sequence[str]) -> Document:
    """The document with the named repairs, in a fixed order.

    newlines: CRLF and CR become LF. control: control characters but tab, LF, FF and CR go, and byte order marks.
    nfc: Unicode's composed form. trim: no blanks at the ends of lines, no empty lines at either end.
    """
    if not steps:
        return document
    if document.messages:
        messages = tuple({**message, "content": _repair(message["content"], steps)} for message in document.messages)
        return replace(document, messages=messages)
    return replace(document, text=_repair(document.text, steps))


def _repair(text: str, steps: Sequence[str]) -> str:
    if "newlines" in steps:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    if "control" in steps:
        text = CONTROL.sub("", text)
    if "nfc" in steps and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    if "trim" in steps:
        text = LINE_ENDS.sub("", text).strip("\n")
    return text
