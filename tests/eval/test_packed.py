import numpy as np
import pytest
import torch

from eval.lm import OwnCodec
from eval.packed import PackedEngine
from eval.sequences import Prompt, Scored

GENERATOR = np.random.default_rng(0)


def sequences(groups: int = 12, head: int = 0) -> list[Scored]:
    """Groups of sequences that share a context; all of them a head of `head` tokens, as few-shot prompts do."""
    shared = GENERATOR.integers(5, 400, head)
    found = []
    for group in range(groups):
        context = [1, *shared, *GENERATOR.integers(5, 400, GENERATOR.integers(3, 30))]
        for _ in range(4):
            choice = GENERATOR.integers(5, 8, GENERATOR.integers(1, 7))  # they share beginnings, too
            ids = np.array([*context, *choice], dtype=np.int32)
            found.append(Scored(ids, len(choice), group, False))
    return found


def one_by_one(model, wanted: list[Scored]) -> list[tuple[float, bool]]:
    """The slow and obvious way."""
    found = []
    with torch.no_grad():
        for item in wanted:
            logits = model(torch.from_numpy(item.inputs).long()[None])[0, -item.num_targets :].double()
            target = torch.from_numpy(item.ids[-item.num_targets :]).long()
            logprob = logits.log_softmax(-1).gather(1, target[:, None]).sum()
            found.append((float(logprob), bool((logits.argmax(-1) == target).all())))
    return found


def answers(engine: PackedEngine, wanted: list[Scored]) -> list[tuple[float, bool]]:
    found = {number: answer for batch in engine.score(wanted) for number, answer in batch.items()}
    return [found[number] for number in range(len(wanted))]


@pytest.mark.parametrize("head", [0, 40])
@pytest.mark.parametrize("batch_tokens", [1, 100, 10_000])
def test_packed_rows_give_what_each_sequence_gives_alone(moe, tokenizer, head, batch_tokens):
    wanted = sequences(head=head)
    # Greedy continuations, which random ones never are.
    for item in wanted[::5]:
        with torch.no_grad():
            item.ids[-1] = int(moe(torch.from_numpy(item.inputs).long()[None])[0, -1].argmax())
    wanted += [Scored(item.ids, 1, item.group, False) for item in wanted[::5]]
    engine = PackedEngine(moe, OwnCodec(tokenizer), batch_tokens)
    expected, got = one_by_one(moe, wanted), answers(engine, wanted)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in expected)
    assert [nats for nats, _ in got] == pytest.approx([nats for nats, _ in expected], abs=1e-3)


def test_a_shared_head_goes_through_the_model_once(moe, tokenizer):
    wanted = sequences(groups=10, head=100)
    engine = PackedEngine(moe, OwnCodec(tokenizer), 2000)
    answers(engine, wanted)
    beginnings = {bytes(item.ids[:k].tobytes()) for item in wanted for k in range(1, len(item.ids))}
    assert engine.work.tokens == len(beginnings)


def test_batches_keep_to_the_budget_and_the_head_to_the_targets(moe, tokenizer, monkeypatch):
    shapes, scored = [], []
    hidden, logits = moe.hidden, moe.logits
    monkeypatch.setattr(moe, "hidden", lambda tokens, cache=None: shapes.append(tokens.shape) or hidden(tokens, cache))
    monkeypatch.setattr(moe, "logits", lambda states: scored.append(len(states)) or logits(states))
    wanted = sequences()
    answers(PackedEngine(moe, OwnCodec(tokenizer), 200), wanted)
    assert all(rows * columns <= 200 or rows == 1 for rows, columns in shapes)
    assert len(shapes) > 1
    assert sum(scored) == sum(item.num_targets for item in wanted)


def test_head_is_split_when_the_vocabulary_is_large(moe, tokenizer, monkeypatch):
    wanted = sequences()
    engine = PackedEngine(moe, OwnCodec(tokenizer), 1000)
    whole = answers(engine, wanted)
    monkeypatch.setattr("eval.packed.HEAD_ELEMENTS", 3 * moe.config.vocab_size)
    split = answers(engine, wanted)
    assert [nats for nats, _ in split] == pytest.approx([nats for nats, _ in whole], abs=1e-4)
    assert [greedy for _, greedy in split] == [greedy for _, greedy in whole]


def greedily(model, tokenizer, prompt: Prompt) -> str:
    """The slow and obvious way: the whole text again for every token."""
    ids, text = prompt.ids.tolist(), ""
    for written in range(1, prompt.max_new + 1):
        with torch.no_grad():
            token = int(model(torch.tensor([ids]))[0, -1].argmax())
        if token in tokenizer.stop_ids:
            break
        ids.append(token)
        text = tokenizer.decode(ids[-written:])
        if any(stop in text for stop in prompt.stops):
            break
    for stop in prompt.stops:
        text = text.split(stop)[0]
    return text


@pytest.mark.parametrize("head", [0, 50])
@pytest.mark.parametrize("batch_tokens", [1, 150, 5000])
def test_texts_are_those_of_greedy_decoding_one_by_one(moe, tokenizer, head, batch_tokens):
    shared = GENERATOR.integers(5, 400, head)
    prompts = []
    for number in range(9):
        ids = np.array([1, *shared, *GENERATOR.integers(5, 400, GENERATOR.integers(2, 40))], dtype=np.int32)
        stops = (("e", "\n"), ("<|end_of_text|>",), ("th", " a"))[number % 3]
        prompts.append(Prompt(ids, stops, (8, 17)[number % 2], number, False))
    found: dict[int, str] = {}
    for batch in PackedEngine(moe, OwnCodec(tokenizer), batch_tokens).write(prompts):
        found |= batch
    expected = [greedily(moe, tokenizer, prompt) for prompt in prompts]
    assert [found[number] for number in range(9)] == expected
    assert len(set(expected)) > 3
