"""Text out of a model: batches, stops, sampling, conversations."""

import dataclasses
import io
import json

import pytest
import torch

from mm_train import decode
from mm_train.cli import UserError
from mm_train.decode import generate
from mm_train.generate import Writer, main
from mm_train.model import MobileMoE
from mm_train.release import load_release, save_release


@pytest.fixture
def model(small_model):
    model = MobileMoE(small_model).eval()
    model.init_weights(0)
    return model


def written(model, prompts, max_new_tokens, **options) -> list[list[int]]:
    rows = [[] for _ in prompts]
    for step in generate(model, prompts, max_new_tokens, **options):
        for row, token in step.items():
            rows[row].append(token)
    return rows


def greedy(model, prompt, count) -> list[int]:
    """By recomputing the whole prefix for every token."""
    ids = list(prompt)
    for _ in range(count):
        ids.append(model(torch.tensor([ids]))[0, -1].argmax().item())
    return ids[len(prompt) :]


def test_greedy_is_the_argmax_of_the_whole_prefix(model):
    assert written(model, [[5, 6, 7]], 12) == [greedy(model, [5, 6, 7], 12)]


def test_a_row_does_not_depend_on_its_batch(model):
    prompts = [[5, 6, 7], list(range(40)), [9]]
    assert written(model, prompts, 10) == [greedy(model, prompt, 10) for prompt in prompts]


def test_finished_rows_leave_and_the_others_go_on(model):
    prompts = [[5, 6, 7], list(range(40)), [9]]
    alone = [greedy(model, prompt, 10) for prompt in prompts]
    stop = alone[1][3]
    want = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert written(model, prompts, 10, stop_ids=[stop]) == want
    assert len(set(map(len, want))) > 1


def test_a_stop_id_ends_it_unseen(model):
    (first,) = written(model, [[5, 6, 7]], 1)[0]
    assert written(model, [[5, 6, 7]], 10, stop_ids=[first]) == [[]]


def test_every_row_ends_with_the_context(model):
    assert [len(ids) for ids in written(model, [[1] * 250, [1] * 200, [1] * 255], 100)] == [6, 56, 1]


def test_sampling_repeats_with_its_seed_and_stays_in_the_nucleus(model):
    options = {"temperature": 5.0, "max_new_tokens": 8}
    first = written(model, [[1, 2], [1, 2]], seed=1, **options)
    assert first == written(model, [[1, 2], [1, 2]], seed=1, **options)
    assert first[0] != first[1]  # one random stream a row
    assert first[:1] == written(model, [[1, 2]], seed=1, **options)
    assert first != written(model, [[1, 2], [1, 2]], seed=2, **options)
    assert written(model, [[1, 2]], top_p=1e-6, **options) == [greedy(model, [1, 2], 8)]  # it holds the likeliest


def test_the_nucleus_may_be_wider_than_what_is_looked_at_first(model, monkeypatch):
    options = {"temperature": 5.0, "max_new_tokens": 8, "top_p": 0.9}
    want = written(model, [[1, 2]], **options)
    monkeypatch.setattr(decode, "NUCLEUS", 1)
    assert written(model, [[1, 2]], **options) == want


@pytest.mark.parametrize("length", [0, 256, 401])
def test_a_prompt_that_leaves_no_room_is_refused(model, length):
    with pytest.raises(UserError, match=rf"prompt has {length} tokens; it needs one, and the context holds 256"):
        written(model, [[1] * length], 1)


def test_a_conversation_computes_only_what_is_new(model, byte_tokenizer, monkeypatch):
    columns, answers = [], []
    hidden, writer = model.hidden, Writer(model, byte_tokenizer, max_new_tokens=5)
    stream = writer.stream

    def counted(tokens, cache=None):
        columns.append(tokens.shape[1])
        return hidden(tokens, cache)

    def recorded(ids, cache):
        answers.append(stream(ids, cache))
        return answers[-1]

    monkeypatch.setattr(model, "hidden", counted)
    monkeypatch.setattr(writer, "stream", recorded)
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\n/reset\nhello\n/quit\nnot read\n"))
    writer.converse(system=None)
    prefills = [count for count in columns if count > 1]
    turns = [{"role": "user", "content": "hello"}]
    opening, _ = byte_tokenizer.render_chat(turns, add_generation_prompt=True)
    turns += [{"role": "assistant", "content": byte_tokenizer.decode(answers[0])}]
    turns += [{"role": "user", "content": "and now?"}]
    second, _ = byte_tokenizer.render_chat(turns, add_generation_prompt=True)
    assert answers == [greedy(model, ids, 5) for ids in (opening, second, opening)]
    assert prefills[0] == len(opening)
    assert len(prefills) == 2  # the third finds its whole beginning in the cache, and computes one column
    assert prefills[1] <= len(second) - len(opening)


def test_a_message_that_does_not_fit_leaves_the_conversation_alive(model, byte_tokenizer, monkeypatch, capsys):
    monkeypatch.setattr("sys.stdin", io.StringIO("x" * 400 + "\nhello\n"))
    Writer(model, byte_tokenizer, max_new_tokens=3).converse(system="be brief")
    output = capsys.readouterr()
    assert "the context holds 256: /reset, or say less" in output.err
    assert len(output.out.splitlines()) >= 1


def test_the_command_appends_its_samples(model, byte_tokenizer, tmp_path, capsys):
    save_release(model, tmp_path / "release", "bf16", byte_tokenizer)
    base = ["--model", str(tmp_path / "release"), "--append-to", str(tmp_path / "s.json"), "--max-new-tokens", "3"]
    assert main([*base, "--prompt", "a", "--prompt", "b"]) == 0
    assert main([*base, "--prompt", "c", "--chat"]) == 0
    samples = json.loads((tmp_path / "s.json").read_text())
    assert [(s["prompt"], s["kind"]) for s in samples] == [("a", "continuation"), ("b", "continuation"), ("c", "chat")]
    assert capsys.readouterr().out.count("--- ") == 3


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "nothing to write about: give --prompt TEXT, or --chat"),
        (["--prompt", "a", "--system", "b"], "--system is a part of the chat format: add --chat"),
        (["--prompt", "a", "--top-p", "0"], "--top-p is 0.0; it must lie in (0, 1]"),
        (["--prompt", "a", "--temperature", "nan"], "--temperature is nan; it must not be negative"),
        (["--prompt", "a", "--temperature", "-1"], "--temperature is -1.0; it must not be negative"),
        (["--prompt", "a", "--seed", "9" * 30], "it must lie in 0..2^62"),
        (["--prompt", "a", "--max-new-tokens", "0"], "--max-new-tokens is 0; it must be at least 1"),
        (["--chat", "--append-to", "x.json"], "--append-to keeps answers to --prompt, not a conversation"),
        (["--prompt", "a"], "model folder not found: nowhere"),
    ],
)
def test_bad_options_are_one_line(options, message, capsys, byte_tokenizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["--model", "nowhere", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--prompt", "a\udcff"], "is not valid UTF-8"),
        (["--prompt", "a", "--append-to", "none/x.json"], "cannot write none/x.json: none is not a folder"),
        (["--prompt", "a", "--append-to", "object.json"], "object.json holds {}, not a list of samples"),
        (["--prompt", "x" * 400], "the prompt has 401 tokens"),
    ],
)
def test_what_cannot_work_with_a_model_is_one_line(
    options, message, model, byte_tokenizer, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    save_release(model, "release", "bf16", byte_tokenizer)
    (tmp_path / "object.json").write_text("{}")
    assert main(["--model", "release", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(model, byte_tokenizer, tmp_path, capsys):
    small = MobileMoE(dataclasses.replace(model.config, vocab_size=96))
    small.init_weights(0)
    with pytest.raises(UserError, match=r"model.vocab_size \(96\) is below the tokenizer's 275"):
        save_release(small, tmp_path / "out", "bf16", byte_tokenizer)
    save_release(small, tmp_path / "out", "bf16")
    byte_tokenizer.save(tmp_path / "out")
    assert main(["--model", str(tmp_path / "out"), "--prompt", "a"]) == 2
    assert "model.vocab_size (96) is below" in capsys.readouterr().err


def test_sampling_is_defined_at_any_temperature(model):
    assert written(model, [[1, 2]], 6, temperature=1e-40) == [greedy(model, [1, 2], 6)]
    assert len(written(model, [[1, 2]], 6, temperature=1e30)[0]) == 6


def test_many_rows_of_a_model_in_16_bits(model, tmp_path):
    """More rows than meet the weights in 16 bits: each still continues its own prompt."""
    save_release(model, tmp_path / "out", "int4")
    narrow, wide = (load_release(tmp_path / "out", dtype) for dtype in (torch.bfloat16, torch.float32))
    prompts = [list(range(k, 2 * k + 3)) for k in range(1, 25)]
    rows = written(narrow, prompts, 4)
    assert [len(row) for row in rows] == [4] * 24
    for prompt, row in zip(prompts, rows, strict=True):
        logits_V = wide(torch.tensor([prompt]))[0, -1]
        assert logits_V[row[0]] > logits_V.max() - 0.1 * logits_V.std()


def test_a_cache_without_room_is_refused(model):
    with pytest.raises(ValueError, match="a cache for 10 tokens cannot take 11"):
        written(model, [[1, 2, 3]], 20, cache=model.new_cache(1, 10))


def test_activations_in_16_bits_keep_their_dtype(small_model):
    model = MobileMoE(small_model, torch.bfloat16).eval()
    model.init_weights(0)
    assert len(written(model, [[1, 2, 3]], 5)[0]) == 5
