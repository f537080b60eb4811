"""Shows what a model is going to read: windows of token shards, decoded, with document borders and the loss mask.

Text that is trained on is green, text that is only read is grey, control tokens are yellow. Where there is no colour
(--colour never, NO_COLOR, or not a terminal), «guillemets» mark what is trained on instead.
"""

import argparse
import itertools
import json
import os
import random
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.plan import SPLITS
from mm_train.cli import UserError, command
from mm_train.manifest import NAME
from mm_train.remote import RemoteFolder, is_url
from mm_train.shards import ShardReader
from mm_train.tokenizer import Tokenizer, load_tokenizer

EXAMPLES = """examples:
  python -m data_prep.peek data/quickstart                              what there is
  python -m data_prep.peek data/quickstart -n 1 | less -R               a window of everything
  python -m data_prep.peek data/quickstart/chat/train                   three windows, chosen at random
  python -m data_prep.peek data/quickstart/code/val --window 40 --seq-len 2048
  python -m data_prep.peek s3://bucket/pretrain/web/train --window 7    read by ranges
  python -m data_prep.peek data/quickstart/docs/train --verify          read everything, compare every sha256
"""
GREEN, GREY, YELLOW, RESET = "\x1b[32m", "\x1b[90m", "\x1b[33m", "\x1b[0m"


Folder = Path | RemoteFolder


def sources(folder: Folder) -> dict[Folder, Folder]:
    """SOURCE/SPLIT folders -> the data set folder: those in `folder`, or `folder` itself. Raises UserError for none."""
    if isinstance(folder, RemoteFolder):
        try:
            names = json.loads(folder.read("dataset.json"))["sources"]
        except FileNotFoundError:
            return {folder: RemoteFolder(folder.url.rsplit("/", 2)[0])}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{folder}/dataset.json is damaged") from None
        return {folder / name / split: folder for name in sorted(names) for split in SPLITS}
    if (folder / NAME).is_file():
        return {folder: folder.resolve().parent.parent}
    found = sorted(file.parent for file in folder.glob("*/*/manifest.json"))
    if not found:
        raise UserError(f"no data set in {folder}: expected SOURCE/SPLIT folders as data_prep.run writes them")
    return dict.fromkeys(found, folder)


def overview(reader: ShardReader) -> str:
    """A source in one line."""
    facts = reader.manifest
    layout = f"rows of {facts.row_length}" if facts.row_length else facts.layout
    revision = f", revision {facts.revision}" if facts.revision else ""
    return (
        f"{reader.folder}: {facts.num_tokens:,} tokens, {facts.num_documents:,} documents, {layout}, "
        f"{len(facts.shards)} shard(s), {facts.domain}, {facts.licence}{revision}"
    )


def show_window(reader: ShardReader, tokenizer: Tokenizer, index: int, seq_len: int, colour: bool) -> Iterator[str]:
    """A heading, then each document (or the part of one) in the window under a line that says where it begins."""
    tokens, mask, starts = reader.window(index, seq_len)
    facts = reader.manifest
    yield f"=== {facts.source}/{facts.split} window {index}: {len(tokens)} tokens, {int(mask.sum())} trained on"
    borders = sorted({0, len(tokens), *np.flatnonzero(starts).tolist()})
    for begin, end in itertools.pairwise(borders):
        if (tokens[begin:end] == tokenizer.pad_id).all():
            yield f"--- padding, {end - begin} tokens"
            continue
        yield f"--- {'document' if starts[begin] else 'document that began earlier'}, {end - begin} tokens"
        yield mark(tokens[begin:end], mask[begin:end], tokenizer, colour)


def mark(tokens: np.ndarray, mask: np.ndarray, tokenizer: Tokenizer, colour: bool) -> str:
    """The text of `tokens`, control tokens spelt out, with what `mask` selects set off."""
    control = tokenizer.token_bytes()[tokens] == 0
    parts = []
    for trained, run in itertools.groupby(range(len(tokens)), lambda i: bool(mask[i])):
        text = ""
        for is_control, part in itertools.groupby(run, lambda i: bool(control[i])):
            piece = _harmless(tokenizer.decode(tokens[list(part)].tolist(), skip_special=False))
            shade = YELLOW if is_control else GREEN if trained else GREY
            text += f"{shade}{piece}{RESET}" if colour else piece
        parts.append(f"«{text}»" if trained and not colour else text)
    return "".join(parts)


def _harmless(text: str) -> str:
    """Control characters out of a corpus must not reach the terminal: they are shown as \\x1b and the like."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", lambda match: repr(match[0])[1:-1], text)


@command
def main(argv: list[str] | None = None) -> int:
    """Command line."""
    parser = argparse.ArgumentParser(
        prog="python -m data_prep.peek",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("folder", help="a data set folder or URL, or one SOURCE/SPLIT folder in it")
    parser.add_argument("-n", type=int, help="how many windows (default: 3 of a source, none of a whole data set)")
    parser.add_argument("--window", type=int, help="begin with this window instead of random ones")
    parser.add_argument("--seq-len", type=int, help="length of a window (default: that of the rows, or 512)")
    parser.add_argument("--seed", type=int, default=0, help="of the random choice")
    parser.add_argument("--colour", choices=("auto", "always", "never"), default="auto", help="(default: auto)")
    parser.add_argument("--verify", action="store_true", help="compare the sha256 of every shard")
    arguments = parser.parse_args(argv)

    folder: Folder = RemoteFolder(arguments.folder) if is_url(arguments.folder) else Path(arguments.folder)
    found = sources(folder)
    single = folder in found
    count = arguments.n if arguments.n is not None else 3 if single else 0
    colour = arguments.colour == "always" or (
        arguments.colour == "auto" and sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    )
    for source, root in found.items():
        reader = ShardReader(source)
        if not single:
            print(overview(reader))
        if arguments.verify:
            reader.verify()
            print(f"{source}: {len(reader.manifest.shards)} shard(s) intact")
        if count:
            tokenizer = load_tokenizer(root.url if isinstance(root, RemoteFolder) else root)
            for index, seq_len in choose(reader, count, arguments.window, arguments.seq_len, arguments.seed):
                print("\n".join(show_window(reader, tokenizer, index, seq_len, colour)))
    return 0


def choose(
    reader: ShardReader, wanted: int, first: int | None, seq_len: int | None, seed: int
) -> Iterator[tuple[int, int]]:
    """(window, its length) of those to show. Raises UserError when there is none such."""
    seq_len = seq_len or (reader.manifest.row_length or 513) - 1
    count = reader.num_windows(seq_len)
    if first is None:
        chosen: Iterable[int] = sorted(random.Random(seed).sample(range(count), min(wanted, count)))
    else:
        chosen = range(first, min(first + wanted, count))
    if first is not None and not chosen:
        raise UserError(f"{reader.folder} has {count} windows of {seq_len} tokens: window {first} is not among them")
    return ((index, seq_len) for index in chosen)


if __name__ == "__main__":
    sys.exit(main())
