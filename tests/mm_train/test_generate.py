import json

import pytest
import torch

from mm_train.cli import UserError
from mm_train.generate import generate, main, write
from mm_train.model import MobileMoE
from mm_train.release import save_release


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    return model


def test_greedy_is_the_argmax_of_the_whole_prefix(model):
    prompt = [5, 6, 7]
    ids = list(generate(model, prompt, 6))
    for i, token in enumerate(ids):
        assert model(torch.tensor([prompt + ids[:i]]))[0, -1].argmax().item() == token


def test_a_stop_id_ends_it_unseen(model):
    first = next(generate(model, [5, 6, 7], 1))
    assert list(generate(model, [5, 6, 7], 10, stop_ids=[first])) == []


def test_it_ends_with_the_context(model):
    assert len(list(generate(model, [1] * 250, 100))) == 6


def test_sampling_repeats_with_its_seed_and_stays_in_the_nucleus(model):
    options = {"temperature": 5.0, "max_new_tokens": 8}
    first = list(generate(model, [1, 2], seed=1, **options))
    assert first == list(generate(model, [1, 2], seed=1, **options))
    assert first != list(generate(model, [1, 2], seed=2, **options))
    greedy = list(generate(model, [1, 2], max_new_tokens=8))
    assert list(generate(model, [1, 2], top_p=1e-6, **options)) == greedy  # the nucleus always holds the best token


def test_a_prompt_that_fills_the_context_is_refused(model, byte_tokenizer):
    with pytest.raises(UserError, match=r"prompt has 401 tokens; the context holds 256"):
        write(model, byte_tokenizer, "x" * 400, chat=False, max_new_tokens=1)


def test_the_command_appends_its_samples(model, byte_tokenizer, tmp_path, capsys):
    save_release(model, tmp_path / "release", "bf16", byte_tokenizer)
    base = ["--model", str(tmp_path / "release"), "--append-to", str(tmp_path / "s.json"), "--max-new-tokens", "3"]
    assert main([*base, "--prompt", "a", "--prompt", "b"]) == 0
    assert main([*base, "--prompt", "c", "--chat"]) == 0
    samples = json.loads((tmp_path / "s.json").read_text())
    assert [(s["prompt"], s["kind"]) for s in samples] == [("a", "continuation"), ("b", "continuation"), ("c", "chat")]
    assert capsys.readouterr().out.count("--- ") == 3
