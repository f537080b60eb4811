import numpy as np
import pytest
import torch

from eval.item_log import READ, SCORED, ItemLog
from eval.lm import LM, OwnCodec
from eval.packed import PackedEngine
from eval.suite import load_suites
from eval.tasks import build
from mm_train.routing_record import listen

BENCHMARKS = {b.name: b for b in load_suites()["paper14"].benchmarks}


def asked(mirror, name: str, items: int = 4) -> list:
    """Requests of a benchmark; written answers are kept short."""
    questions = build(BENCHMARKS[name], mirror, items)
    for item in questions.items:
        for request in item.requests:
            if request.request_type == "generate_until":
                request.arguments = (request.args[0], request.args[1] | {"max_gen_toks": 6})
    return [(number, request) for number, item in enumerate(questions.items) for request in item.requests]


def counted(moe, tokenizer, requests, batch_tokens: int, name: str = "x", log=None) -> np.ndarray:
    engine = PackedEngine(moe, OwnCodec(tokenizer), batch_tokens)
    engine.count_experts()
    lm = LM(engine, log)
    lm.answer(requests, name)
    return lm.used()[name].counts


@pytest.fixture(autouse=True)
def no_hooks_stay(moe):
    yield
    for layer in moe.moe_layers():
        layer.router._forward_hooks.clear()


@pytest.mark.parametrize("name", ["piqa", "mmlu", "nq"])
def test_counts_do_not_depend_on_batches(moe, tokenizer, mirror, name):
    requests = asked(mirror, name)
    small, large = (counted(moe, tokenizer, requests, budget) for budget in (1, 4000))
    # Sums of other batches differ in their last bit, which may tip a choice.
    assert np.abs(small - large).sum() <= 0.002 * large.sum()
    assert (small.sum(2) == large.sum(2)).all()


def test_counts_are_those_of_every_token_once(moe, tokenizer, mirror):
    """A tree of choices counts its question once, and each choice."""
    requests = asked(mirror, "piqa")
    counts = counted(moe, tokenizer, requests, 300)
    chosen: dict[tuple, list[int]] = {}  # by (document, path from the root): a token that choices share is one
    scored: dict[tuple, list[int]] = {}
    hooks = listen(moe, lambda layer, ids_TK: heard.append(ids_TK) if layer == 0 else None)
    for number, request in requests:
        text, choice = request.args
        ids, context = ([tokenizer.bos_id, *tokenizer.encode(t)] for t in (text + choice, text))
        heard: list[torch.Tensor] = []
        with torch.no_grad():
            moe(torch.tensor([ids[:-1]]))
        for place, experts in enumerate(heard[0].tolist()):
            chosen[number, *ids[: place + 1]] = experts
            if place >= len(context) - 1:
                scored[number, *ids[: place + 1]] = experts
    for hook in hooks:
        hook.remove()
    for which, expected in ((READ, chosen), (SCORED, scored)):
        wanted = np.bincount([e for experts in expected.values() for e in experts], minlength=counts.shape[2])
        assert counts[which, 0].tolist() == wanted.tolist()


def test_a_prompt_that_rows_share_counts_for_each_of_them(moe, tokenizer):
    from eval.sequences import Scored

    head, tails = list(range(5, 85)), ([90, 91], [92, 93, 94], [95, 96])
    rows = [Scored(np.array([1, *head, *tail], dtype=np.int32), 1, k, False) for k, tail in enumerate(tails)]
    engine = PackedEngine(moe, OwnCodec(tokenizer), 4000)
    engine.count_experts()
    answered = sum(len(batch) for batch in engine.score(rows))
    counts = engine.counted()
    assert answered == 3
    assert engine.work.tokens < 3 * 81  # the head was computed once
    per_token = moe.config.num_experts_per_tok
    assert counts[READ].sum(1).tolist() == [per_token * sum(len(row.inputs) for row in rows)] * counts.shape[1]
    assert counts[SCORED].sum(1).tolist() == [per_token * 3] * counts.shape[1]
    assert engine.counted() is None  # taken


def test_written_tokens_are_scored_and_not_read(moe, tokenizer, mirror):
    requests = asked(mirror, "nq")
    counts = counted(moe, tokenizer, requests, 4000)
    per_token = moe.config.num_experts_per_tok
    prompts = sum(1 + len(tokenizer.encode(request.args[0])) for _, request in requests)
    assert counts[READ, 0].sum() <= per_token * prompts  # less where they are cut to the context
    assert per_token * len(requests) <= counts[SCORED, 0].sum() <= per_token * len(requests) * 6


def test_the_log_keeps_counts_with_the_answers(moe, tokenizer, mirror, tmp_path):
    requests = asked(mirror, "piqa")
    whole = counted(moe, tokenizer, requests, 300)
    log = ItemLog(tmp_path)
    counted(moe, tokenizer, requests[:4], 300, "piqa", log)
    log.close()
    again = ItemLog(tmp_path)
    engine = PackedEngine(moe, OwnCodec(tokenizer), 300)
    engine.count_experts()
    lm = LM(engine, again)
    lm.answer(requests, "piqa")
    used = lm.used()["piqa"]
    assert used.requests == lm.asked["piqa"] == len(requests)
    assert (used.counts.sum(2) == whole.sum(2)).all()
    again.close()


def test_answers_are_the_same_with_and_without_counting(moe, tokenizer, mirror):
    requests = asked(mirror, "piqa")
    plain = LM(PackedEngine(moe, OwnCodec(tokenizer), 300)).answer(requests)
    engine = PackedEngine(moe, OwnCodec(tokenizer), 300)
    engine.count_experts()
    assert LM(engine).answer(requests) == plain
