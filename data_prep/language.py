"""A filter that keeps documents of some languages, by py3langid, which carries its model and needs no network.

datatrove's own filter downloads one of fastText's. Language is judged by the first CHARACTERS of a document: a book
costs no more than a page.
"""

import functools
from collections.abc import Sequence
from typing import Any

from data_prep.documents import Document
from mm_train.cli import UserError

CHARACTERS = 3000


class LanguageFilter:
    """Called with a document; returns it, and why it is dropped ("" when it is kept)."""

    def __init__(self, keep: Sequence[str] = (), min_probability: float = 0.0) -> None:
        """`keep`: ISO 639-1 codes. A document is kept when the likeliest language is one of them, and the probability
        of all of them together is at least `min_probability`.

        Raises UserError when py3langid is not installed, and for a code that it does not know.
        """
        self._identifier = _identifier()
        unknown = sorted(set(keep) - set(self._identifier.labels))
        if isinstance(keep, str) or not keep or unknown:
            raise UserError(
                f"filter language: keep is {keep!r}; it must be a list of codes such as [en, de]"
                + (f"; unknown: {', '.join(unknown)}" if unknown and not isinstance(keep, str) else "")
            )
        if not 0 <= min_probability <= 1:
            raise UserError(f"filter language: min_probability is {min_probability}; it must lie in [0, 1]")
        self._keep, self._min = frozenset(keep), min_probability

    def __call__(self, document: Document) -> tuple[Document, str]:
        ranked = self._identifier.rank("\n".join(document.parts)[:CHARACTERS])
        likeliest = ranked[0][0]
        if likeliest not in self._keep:
            return document, f"language: {likeliest}"
        if sum(score for code, score in ranked if code in self._keep) < self._min:
            return document, "language: unclear"
        return document, ""


@functools.lru_cache(maxsize=1)
def _identifier() -> Any:
    try:
        from py3langid.langid import MODEL_FILE, LanguageIdentifier
    except ImportError as error:
        raise UserError(f'filter language needs {error.name}: pip install "mobilemoe-train[quality]"') from None
    return LanguageIdentifier.from_model_file(MODEL_FILE, norm_probs=True)
