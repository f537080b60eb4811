import math

import numpy as np
import pytest
import torch

from mm_train.data import open_sources
from mm_train.model import MobileMoE
from mm_train.parallel.groups import Groups
from mm_train.tokenizer import load_tokenizer
from mm_train.validate import main, validate


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model).train()
    model.init_weights(0)
    return model


def test_score_equals_a_token_by_token_sum(model, data_set):
    readers = open_sources(data_set, ["code", "chat"], "val", 64)
    token_bytes = load_tokenizer(data_set).token_bytes()
    scores = validate(model, readers, token_bytes, 64, 3, Groups())
    for name, reader in readers.items():
        nats, tokens, num_bytes = 0.0, 0, 0
        for index in range(reader.num_windows(64)):
            ids, mask, starts = reader.window(index, 64)
            first = 0
            # each document alone, so that the masks of attention are checked as well
            for end in [*np.flatnonzero(starts[1:64]) + 1, 64]:
                logits = model.eval()(torch.from_numpy(ids[first:end].astype(np.int64))[None])[0]
                log_probs = torch.log_softmax(logits, -1)
                for i in range(first, end):
                    if mask[i + 1] and not starts[i + 1]:
                        nats -= log_probs[i - first, int(ids[i + 1])].item()
                        tokens += 1
                        num_bytes += int(token_bytes[ids[i + 1]])
                first = end
        score = scores[name]
        assert (score.tokens, score.bytes) == (tokens, num_bytes)
        assert score.loss == pytest.approx(nats / tokens, rel=1e-5)
        assert score.bits_per_byte == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_it_leaves_the_model_as_it_was_and_can_stop_early(model, data_set):
    readers = open_sources(data_set, ["code"], "val", 64)
    token_bytes = load_tokenizer(data_set).token_bytes()
    scores = validate(model, readers, token_bytes, 64, 2, Groups(), max_tokens=200)
    assert model.training
    assert scores["code"].tokens <= 192


def test_command_errors(tmp_path, data_set, capsys):
    arguments = ["--data", str(data_set), "--sources", "code"]
    assert main(["--model", str(tmp_path / "none"), *arguments]) == 2
    assert "model folder not found" in capsys.readouterr().err
