"""A document as the token sequences that the model sees."""

from data_prep.sources import Document
from mm_train.tokenizer import Tokenizer

Rendered = tuple[list[int], list[bool]]  # ids, and which of them are trained on


def render(document: Document, tokenizer: Tokenizer, row_length: int | None = None) -> list[Rendered]:
    """Ids and loss mask of one document; several when it is a text that has to be cut to fit `row_length`.

    A text is BOS, its tokens, EOS, all trained on but BOS, which nothing before it foretells. A conversation follows
    the chat format and is trained on in the answers; it is never cut, as half an answer teaches to stop anywhere.
    """
    if document.messages:
        return [tokenizer.render_chat(document.messages)]
    ids = [tokenizer.bos_id, *tokenizer.encode(document.text), tokenizer.eos_id]
    mask = [False] + [True] * (len(ids) - 1)
    step = row_length or len(ids)
    return [(ids[i : i + step], mask[i : i + step]) for i in range(0, len(ids), step)]
