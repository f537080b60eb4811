"""Token corpora of Megatron-LM (PREFIX.bin and PREFIX.idx) to shards, and back, through megatron-core's own classes.

Tokens are taken as they are: the tokenizer has to be the one that they were made by. A document is what Megatron calls
one; the sequences in it are joined. Megatron has no loss masks: what is trained on in a conversation is lost on the way
out, so --drop-mask has to say that this is wanted. Padding of packed rows is left out.
"""

import argparse
import itertools
import os
import struct
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from mm_train.cli import UserError, command, first_line
from mm_train.files import publish, sync
from mm_train.manifest import Manifest
from mm_train.shards import ShardReader, ShardWriter
from mm_train.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """examples:
  python -m data_prep.megatron import corpora/web_text_document data/pretrain --source web \\
      --tokenizer llama3 --licence ODC-BY-1.0 --domain web
  python -m data_prep.megatron export data/pretrain/web/train corpora/web
"""


def import_corpus(
    prefix: Path,
    out: Path,
    tokenizer: Tokenizer,
    source: str,
    split: str = "train",
    *,
    licence: str,
    domain: str,
    revision: str | None = None,
    shard_tokens: int = 1 << 25,
) -> Manifest:
    """Write OUT/SOURCE/SPLIT. Raises UserError for a corpus that cannot be read, or that another tokenizer made."""
    documents = _documents(prefix)
    if (out / "tokenizer.json").exists():
        if load_tokenizer(out).sha256 != tokenizer.sha256:
            raise UserError(f"{out} has another tokenizer than {prefix}: choose another folder")
    else:
        out.mkdir(parents=True, exist_ok=True)
        tokenizer.save(out)
    writer = ShardWriter(
        out,
        source,
        split,
        tokenizer_sha256=tokenizer.sha256,
        vocab_size=tokenizer.vocab_size,
        licence=licence,
        domain=domain,
        revision=revision,
        shard_tokens=shard_tokens,
    )
    token_bytes, empty = tokenizer.token_bytes(), 0
    for number, tokens in enumerate(documents):
        if len(tokens) == 0:
            empty += 1
            continue
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= tokenizer.vocab_size:
            raise UserError(
                f"document {number} of {prefix} has token {low if low < 0 else high}, and the tokenizer's ids are"
                f" 0 to {tokenizer.vocab_size - 1}: was the corpus made by another one?"
            )
        writer.add(tokens, num_bytes=int(token_bytes[tokens].sum()))
    return writer.close({"megatron": prefix.name, "dropped": {"empty": empty}})


def export_corpus(folder: Path, prefix: Path, drop_mask: bool = False) -> tuple[int, int]:
    """Write PREFIX.bin and PREFIX.idx from a SOURCE/SPLIT folder; returns (documents, tokens).

    Raises UserError for shards that cannot be read, for loss masks unless `drop_mask`, and for files that exist.
    """
    indexed = _indexed_dataset()
    reader = ShardReader(folder)
    if reader.manifest.has_mask and not drop_mask:
        raise UserError(f"{folder} has loss masks, which Megatron's format cannot keep: --drop-mask leaves them out")
    finals = [prefix.with_name(prefix.name + end) for end in (".bin", ".idx")]
    for final in finals:
        if final.exists():
            raise UserError(f"{final} exists: remove it or choose another name")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    temporary = [final.with_name(final.name + ".tmp") for final in finals]
    pad_id = load_tokenizer(folder.resolve().parent.parent).pad_id if reader.manifest.row_length else None
    count = tokens = 0
    try:
        builder = indexed.IndexedDatasetBuilder(
            str(temporary[0]), dtype=indexed.DType.optimal_dtype(reader.manifest.vocab_size)
        )
        with tqdm(total=reader.num_tokens, desc="export", unit="tok", unit_scale=True, disable=None) as bar:
            for ids, mask in reader.documents():
                bar.update(len(ids))
                if pad_id is not None and not mask.any() and (ids == pad_id).all():
                    continue
                builder.add_document(ids, [len(ids)])
                count, tokens = count + 1, tokens + len(ids)
        builder.finalize(str(temporary[1]))
        for path, final in zip(temporary, finals, strict=True):  # the index last: without it there is no corpus
            sync(path)
            publish(path, final)
    finally:
        for path in temporary:
            path.unlink(missing_ok=True)
    return count, tokens


def _documents(prefix: Path) -> Iterator[np.ndarray]:
    """The tokens of each document. Raises UserError at once where there is no corpus, and later for a damaged one."""
    indexed = _indexed_dataset()
    for end in (".idx", ".bin"):
        if not os.path.isfile(f"{prefix}{end}"):
            raise UserError(f"no corpus at {prefix}: {prefix}{end} is missing (give the name without its ending)")
    try:
        _check_sizes(prefix, indexed)
        corpus = indexed.IndexedDataset(str(prefix))
        borders, ends = corpus.document_indices.astype(np.int64), np.cumsum(corpus.sequence_lengths, dtype=np.int64)
        width = corpus.index.dtype_size
        begins = width * np.append(0, ends[:-1])
        if borders[0] != 0 or (np.diff(borders) < 0).any() or (corpus.index.sequence_pointers != begins).any():
            raise ValueError("its documents do not follow one another")
        size = os.path.getsize(f"{prefix}.bin")
        if size != width * int(ends[-1]):
            raise ValueError(f"{size} bytes of tokens, {width * int(ends[-1])} expected")
    except (AssertionError, ValueError, KeyError, IndexError, OSError, struct.error) as error:
        raise UserError(f"damaged corpus {prefix}: {first_line(error)}") from None
    return _joined(corpus, borders)


def _check_sizes(prefix: Path, indexed: Any) -> None:
    """Raises ValueError for files that megatron-core would fail on half-way, with tracebacks that cannot be caught."""
    with open(f"{prefix}.idx", "rb") as file:
        head, size = file.read(34), os.fstat(file.fileno()).st_size
    magic, version, code, sequences, documents = struct.unpack("<9sQBQQ", head)
    if (magic, version) != (b"MMIDIDX\0\0", 1):
        raise ValueError("its index is not one of Megatron's, version 1")
    dtype = indexed.DType.dtype_from_code(code)
    if not np.issubdtype(dtype, np.integer):
        raise ValueError(f"it holds {np.dtype(dtype)}, not token ids")
    if size != (expected := len(head) + 12 * sequences + 8 * documents):
        raise ValueError(f"{size} bytes of index, {expected} expected")
    if sequences == 0 or documents < 2 or os.path.getsize(f"{prefix}.bin") == 0:
        raise ValueError("it has no tokens")


def _joined(corpus: Any, borders: np.ndarray) -> Iterator[np.ndarray]:
    nothing = np.empty(0, dtype=np.uint32)
    pairs = itertools.pairwise(borders.tolist())
    for begin, end in tqdm(pairs, total=len(borders) - 1, desc="import", unit="doc", unit_scale=True, disable=None):
        parts = [corpus[i] for i in range(begin, end)]
        yield np.concatenate(parts) if len(parts) > 1 else parts[0] if parts else nothing


def _indexed_dataset() -> Any:
    """megatron-core's module. Raises UserError where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it looks for fused kernels that no corpus needs
            from megatron.core.datasets import indexed_dataset
    except ImportError:
        raise UserError("this needs the package megatron-core: pip install 'mobilemoe-train[distributed]'") from None
    return indexed_dataset


@command
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.megatron",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", required=True)
    reading = actions.add_parser("import", help="PREFIX.bin and PREFIX.idx -> OUT/SOURCE/SPLIT")
    reading.add_argument("prefix", type=Path, help="the files' name without .bin and .idx")
    reading.add_argument("out", type=Path, help="data set folder")
    reading.add_argument("--source", required=True, help="name of the source")
    reading.add_argument("--split", choices=("train", "val"), default="train", help="(default: %(default)s)")
    reading.add_argument("--tokenizer", required=True, help="folder with tokenizer.json, or the word llama3")
    reading.add_argument("--licence", required=True, help="of the documents, as an SPDX name where there is one")
    reading.add_argument("--domain", required=True, help="web, code, math, ...")
    reading.add_argument("--revision", help="of the data set that the documents are from")
    writing = actions.add_parser("export", help="SOURCE/SPLIT folder -> PREFIX.bin and PREFIX.idx")
    writing.add_argument("folder", type=Path, help="a SOURCE/SPLIT folder of a data set")
    writing.add_argument("prefix", type=Path, help="the files' name without .bin and .idx")
    writing.add_argument("--drop-mask", action="store_true", help="leave loss masks out")
    arguments = parser.parse_args(argv)
    try:
        if arguments.action == "export":
            documents, tokens = export_corpus(arguments.folder, arguments.prefix, arguments.drop_mask)
            print(f"{arguments.prefix}: {documents:,} documents, {tokens:,} tokens")
            return 0
        manifest = import_corpus(
            arguments.prefix,
            arguments.out,
            load_tokenizer(arguments.tokenizer),
            arguments.source,
            arguments.split,
            licence=arguments.licence,
            domain=arguments.domain,
            revision=arguments.revision,
        )
    except OSError as error:
        raise UserError(f"cannot write {error.filename or ''}: {error.strerror or error}") from None
    empty = manifest.extra["dropped"]["empty"]
    left_out = f"; left out: {empty:,} empty documents" if empty else ""
    print(
        f"{arguments.out / manifest.source / manifest.split}: {manifest.num_documents:,} documents,"
        f" {manifest.num_tokens:,} tokens, {len(manifest.shards)} shard(s){left_out}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
