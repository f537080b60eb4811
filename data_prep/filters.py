"""Quality filters: those of datatrove, by name, with its defaults unless a source sets other values; and `language`.

datatrove's are written for English prose. Words are cut by spaCy, which takes far more time than everything else that
is done to a text.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from data_prep.documents import Document
from data_prep.language import LanguageFilter
from mm_train.cli import UserError, first_line

CLASSES = {
    "gopher_quality": ("gopher_quality_filter", "GopherQualityFilter"),
    "gopher_repetition": ("gopher_repetition_filter", "GopherRepetitionFilter"),
    "c4_quality": ("c4_filters", "C4QualityFilter"),
    "fineweb_quality": ("fineweb_quality_filter", "FineWebQualityFilter"),
}

Filter = Callable[[Document], tuple[Document, str]]  # what is left of a document, and why it is dropped ("": kept)


def load_filters(wanted: Mapping[str, Any]) -> list[Filter]:
    """The filters `wanted` (name -> options, as keyword arguments of datatrove's class), in the order given.

    Raises UserError when datatrove is not installed or does not know an option.
    """
    return [_load(name, dict(options or {})) for name, options in wanted.items()]


def _load(name: str, options: dict[str, Any]) -> Filter:
    if name == "language":
        try:
            return LanguageFilter(**options)
        except TypeError as error:
            raise UserError(f"filter language: {first_line(error)}") from None
    module, cls = CLASSES[name]
    os.environ.setdefault("LOGURU_LEVEL", "WARNING")  # before datatrove is imported: it logs to stderr by itself
    try:
        datatrove = importlib.import_module("datatrove.data")
        filter_ = getattr(importlib.import_module(f"datatrove.pipeline.filters.{module}"), cls)(**options)
        importlib.import_module("spacy")
    except ImportError as error:
        raise UserError(f'filter {name} needs {error.name}: pip install "mobilemoe-train[quality]"') from None
    except TypeError as error:
        raise UserError(f"filter {name}: {first_line(error)}") from None

    def apply(document: Document) -> tuple[Document, str]:
        """A conversation is judged by its answers together, and never changed; c4_quality takes lines out of texts."""
        answers = [message["content"] for message in document.messages if message["role"] == "assistant"]
        judged = datatrove.Document(text="\n\n".join(answers) if document.messages else document.text, id="")
        if not judged.text.strip():
            return document, "empty"
        result = filter_.filter(judged)
        kept, why = result if isinstance(result, tuple) else (result, "")
        if not kept:
            return document, f"{name}: {why or 'dropped'}"
        return (document if document.messages else replace(document, text=judged.text)), ""

    return apply
