"""Learns a small byte-level BPE from text. The result is a function of the text and the size alone."""

import json
from collections.abc import Iterable

import tokenizers

from mm_train.cli import UserError
from mm_train.tokenizer import CONTROL_TOKENS, SPLIT_REGEX, Tokenizer, assemble


def train_bpe(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A tokenizer of exactly `vocab_size` tokens, control tokens included, last.

    Raises UserError when the text is too little for so many tokens.
    """
    byte_level = tokenizers.pre_tokenizers.ByteLevel
    learner = tokenizers.Tokenizer(tokenizers.models.BPE())
    learner.pre_tokenizer = tokenizers.pre_tokenizers.Sequence(
        [
            tokenizers.pre_tokenizers.Split(tokenizers.Regex(SPLIT_REGEX), "isolated"),
            byte_level(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab_size - len(CONTROL_TOKENS),
        initial_alphabet=sorted(byte_level.alphabet()),
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = assemble(model["vocab"], model["merges"])
    if tokenizer.vocab_size != vocab_size:
        raise UserError(
            f"the training text is too little to learn {vocab_size} tokens from (it gave {tokenizer.vocab_size}): "
            "set a smaller tokenizer.vocab_size or give more text"
        )
    return tokenizer
