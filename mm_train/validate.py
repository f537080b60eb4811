"""Held-out loss and bits per byte, of a model in training or of any saved one.

python -m mm_train.validate --model runs/quickstart/qat --data data/quickstart --sources code,docs
"""

import argparse
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kernels.cross_entropy import IGNORE
from mm_train.cli import UserError, command
from mm_train.data import Batch, collate, open_sources
from mm_train.files import write_atomic
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.shards import ShardReader
from mm_train.tokenizer import load_tokenizer


@dataclass
class Score:
    """Held-out result of one source."""

    loss: float  # nats per scored token
    bits_per_byte: float  # of the text that the scored tokens stand for
    tokens: int
    bytes: int


@torch.no_grad()
def validate(
    model: MobileMoE,
    readers: Mapping[str, ShardReader],
    token_bytes_V: np.ndarray,
    seq_len: int,
    rows: int,
    groups: Groups,
    max_tokens: int = 0,
    beat: Callable[[], object] = lambda: None,
    seen: Callable[[str, Batch], object] = lambda *_: None,
) -> dict[str, Score]:
    """Score the held-out rows of each source, shared out over the ranks; routing is dropless. Collective.

    Args:
        rows: rows a rank scores at once.
        token_bytes_V: UTF-8 bytes of each token id (Tokenizer.token_bytes).
        max_tokens: of each source, in rows spread evenly over it; 0: all its full rows.
        beat: called before every forward pass.
        seen: called after it, with the source and the batch; rows beyond the end have no label.
    """
    training = model.training
    model.eval()
    bytes_V = torch.from_numpy(token_bytes_V.astype(np.int64)).to(groups.device)
    scores = {}
    for name, reader in readers.items():
        total = reader.num_windows(seq_len)
        count = min(total, max(1, max_tokens // seq_len)) if max_tokens else total
        windows = [i * total // count for i in range(count)]
        after = functools.partial(seen, name)
        sums = _sum_rows(model, reader, windows, seq_len, rows, bytes_V, groups, beat, after)
        nats, tokens, num_bytes = groups.sum(sums).tolist()
        scores[name] = Score(nats / max(tokens, 1), nats / math.log(2) / max(num_bytes, 1), int(tokens), int(num_bytes))
    model.train(training)
    return scores


def _sum_rows(
    model: MobileMoE,
    reader: ShardReader,
    windows: Sequence[int],
    seq_len: int,
    rows: int,
    bytes_V: Tensor,
    groups: Groups,
    beat: Callable[[], object],
    seen: Callable[[Batch], object],
) -> Tensor:
    """Nats, scored tokens and their bytes over this rank's share of the rows, float64."""
    sums = torch.zeros(3, dtype=torch.float64, device=groups.device)
    for start in range(0, len(windows), rows * groups.dp_size):
        beat()
        # All ranks make equally many forward passes, as all-to-all needs; rows beyond the end score nothing.
        first = start + groups.dp_rank * rows
        mine = [windows[i % len(windows)] for i in range(first, first + rows)]
        batch = collate([reader.row(window, seq_len) for window in mine]).to(groups.device)
        batch.labels_BT[max(0, len(windows) - first) :] = IGNORE
        losses = model.losses(batch.tokens_BT, batch.labels_BT, batch.document_BT, batch.lengths)
        seen(batch)
        scored = batch.labels_BT[batch.labels_BT != IGNORE]
        sums += torch.stack([losses.cross_entropy_sum.double(), _count(scored), bytes_V[scored].sum().double()])
    return sums


def _count(labels: Tensor) -> Tensor:
    return torch.tensor(labels.numel(), dtype=torch.float64, device=labels.device)


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m mm_train.validate", description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, type=Path, help="run, checkpoint or release folder")
    parser.add_argument("--data", required=True, type=Path, help="data set folder written by data_prep")
    parser.add_argument("--sources", required=True, help="comma-separated source names")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a row (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows at once (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=0, help="of each source (default: all that is held out)")
    parser.add_argument("--out", type=Path, help="also write the scores to this JSON file")
    args = parser.parse_args(argv)
    from mm_train.model_folder import check_same_tokenizer, load_model

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load_model(args.model, device=str(device))
    longest = model.config.max_position_embeddings
    if not 1 <= args.seq_len <= longest or args.rows < 1:
        raise UserError(f"--seq-len {args.seq_len} must lie in 1..{longest} and --rows {args.rows} must be at least 1")
    tokenizer = load_tokenizer(args.data)
    check_same_tokenizer(args.model, tokenizer, args.data)
    readers = open_sources(args.data, args.sources.split(","), "val", args.seq_len)
    scores = validate(
        model, readers, tokenizer.token_bytes(), args.seq_len, args.rows, Groups(device=device), args.max_tokens
    )
    for name, score in scores.items():
        print(f"{name:12s} loss {score.loss:.4f}  {score.bits_per_byte:.4f} bits per byte  {score.tokens} tokens")
    if args.out:
        try:
            write_atomic(
                args.out, json.dumps({name: asdict(score) for name, score in scores.items()}, indent=1).encode()
            )
        except OSError as error:
            raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    return 0


if __name__ == "__main__":
    sys.exit(main())
