"""Documents as the token sequences that the model sees."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data_prep.documents import Document
from data_prep.fast_tokenizer import Encode
from mm_train.tokenizer import Tokenizer

Piece = tuple[np.ndarray, np.ndarray | None]  # ids uint32, and which of them are trained on (None: all)


@dataclass(frozen=True)
class Frame:
    """The control tokens around a text and around the messages of a conversation."""

    bos_id: int
    eos_id: int
    eot_id: int
    pad_id: int
    headers: dict[str, list[int]]

    @classmethod
    def of(cls, tokenizer: Tokenizer, encode: Encode) -> "Frame":
        """Those of `tokenizer`; `encode` is a function that tokenises as it does."""
        headers = tokenizer.headers_by(lambda text: encode([text])[0].tolist())
        return cls(tokenizer.bos_id, tokenizer.eos_id, tokenizer.eot_id, tokenizer.pad_id, headers)


def render(
    documents: Sequence[Document], frame: Frame, encode: Encode, row_length: int | None = None
) -> list[list[Piece]]:
    """Each document as one piece; as several when it is a text that has to be cut to fit `row_length`.

    A text is BOS, its tokens, EOS, all trained on but BOS, which nothing before it foretells. A conversation follows
    the chat format, as Tokenizer.render_chat has it, and is trained on in every answer; it is never cut, as half an
    answer teaches to stop anywhere. Texts of a stream (`row_length` None) come without a mask.
    """
    ids, borders = encode([part for document in documents for part in document.parts])
    edges = borders.tolist()
    bos, eos = np.array([frame.bos_id], dtype=np.uint32), np.array([frame.eos_id], dtype=np.uint32)
    rendered = []
    at = 0
    for document in documents:
        if document.messages:
            contents = [ids[edges[at + i] : edges[at + i + 1]] for i in range(len(document.messages))]
            rendered.append([_conversation(document, contents, frame)])
            at += len(contents)
        else:
            whole = np.concatenate([bos, ids[edges[at] : edges[at + 1]], eos])
            rendered.append(_cut(whole, row_length) if row_length else [(whole, None)])
            at += 1
    return rendered


def trained_on(ids: np.ndarray) -> np.ndarray:
    """The mask of a text: all of it but BOS."""
    mask = np.ones(len(ids), dtype=np.bool_)
    mask[0] = False
    return mask


def _cut(ids: np.ndarray, row_length: int) -> list[Piece]:
    mask = trained_on(ids)
    return [(ids[i : i + row_length], mask[i : i + row_length]) for i in range(0, len(ids), row_length)]


def _conversation(document: Document, contents: list[np.ndarray], frame: Frame) -> Piece:
    ids: list[np.ndarray | list[int]] = [[frame.bos_id]]
    trained = [(1, False)]
    for message, content in zip(document.messages, contents, strict=True):
        header = frame.headers[message["role"]]
        ids += [header, content, [frame.eot_id]]
        trained += [(len(header), False), (len(content) + 1, message["role"] == "assistant")]
    mask = np.repeat([keep for _, keep in trained], [length for length, _ in trained])
    return np.concatenate(ids).astype(np.uint32), mask
