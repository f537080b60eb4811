import pytest
import torch
from lm_eval.api.instance import Instance

from eval.lm import MobileMoELM
from eval.score import load_tasks
from eval.suite import load_suites
from mm_train.model import MobileMoE


def request(context: str, continuation: str) -> Instance:
    return Instance("loglikelihood", {}, (context, continuation), 0)


@pytest.fixture(scope="module")
def requests(mirror, llama, tokenizer) -> list[Instance]:
    """All requests of the nine multiple-choice benchmarks (two of MMLU's subjects), and edge cases."""
    found = []
    for benchmark in load_suites()["paper14"].benchmarks:
        if benchmark.kind == "multiple_choice":
            for task in load_tasks(benchmark, mirror)[:2]:
                for document in task.task_docs:
                    context = task.fewshot_context(document, num_fewshot=benchmark.shots)
                    found += task.construct_requests(doc=document, ctx=context, metadata=("t", 0, 1))
    found += [request("", "Tea is"), request("ends in spaces  ", "go on"), request("Question: a\n", "b")]
    # Continuations that greedy decoding gives: random ones never are.
    for context in ("is", "Water boils", "a drink made", "the trophy", "Ana gave Ben", "It rusts"):
        ids = [tokenizer.bos_id, *tokenizer.encode(context)]
        with torch.no_grad():
            best = int(llama(torch.tensor([ids])).logits[0, -1].argmax())
        text = tokenizer.decode([best])
        if text and [tokenizer.bos_id, *tokenizer.encode(context + text)] == [*ids, best]:
            found.append(request(context, text))
    return found


def test_equals_lm_evals_own_path(requests, model, tokenizer, hflm):
    lm = MobileMoELM(model, tokenizer, batch_tokens=500)
    expected = hflm.loglikelihood(requests, disable_tqdm=True)
    got = lm.loglikelihood(requests)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert any(greedy for _, greedy in expected)
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)
    assert 0 < lm.num_truncated < len(requests)  # MMLU's prompts overflow the context, others do not


@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_batch_budget_does_not_change_scores(requests, model, tokenizer, budget):
    expected = MobileMoELM(model, tokenizer, batch_tokens=1000).loglikelihood(requests)
    got = MobileMoELM(model, tokenizer, batch_tokens=budget).loglikelihood(requests)
    assert [greedy for _, greedy in got] == [greedy for _, greedy in expected]
    assert [value for value, _ in got] == pytest.approx([value for value, _ in expected], abs=1e-4)


def test_mixture_of_experts_does_not_depend_on_the_batch(requests, small_model, tokenizer):
    moe = MobileMoE(small_model).eval()
    moe.init_weights(0)
    one, many = (MobileMoELM(moe, tokenizer, batch_tokens=budget).loglikelihood(requests) for budget in (1, 4000))
    assert [value for value, _ in one] == pytest.approx([value for value, _ in many], abs=1e-4)


class Recorder:
    """Passes calls on and notes their shapes."""

    def __init__(self, model) -> None:
        self.model, self.config = model, model.config
        self.inputs: list[tuple[int, ...]] = []
        self.heads: list[int] = []

    def hidden(self, tokens_BT):
        self.inputs.append(tuple(tokens_BT.shape))
        return self.model.hidden(tokens_BT)

    def logits(self, hidden_ND):
        self.heads.append(len(hidden_ND))
        return self.model.logits(hidden_ND)


def test_batches_keep_to_the_budget_and_the_head_to_the_continuations(requests, model, tokenizer):
    recorder = Recorder(model)
    MobileMoELM(recorder, tokenizer, batch_tokens=400).loglikelihood(requests)
    assert all(rows * length <= 400 for rows, length in recorder.inputs)
    lengths = [length for _, length in recorder.inputs]
    assert lengths == sorted(lengths, reverse=True)
    scored = 0
    for item in requests:
        context, continuation = item.args
        scored += len(tokenizer.encode(context + continuation)) - len(tokenizer.encode(context.rstrip()))
    assert sum(recorder.heads) == scored


def test_choices_of_one_token_share_a_row(model, tokenizer):
    recorder = Recorder(model)
    lm = MobileMoELM(recorder, tokenizer, batch_tokens=400)
    answers = lm.loglikelihood([request("Is it so?\nAnswer:", choice) for choice in (" A", " B", " C", " D")])
    assert [rows for rows, _ in recorder.inputs] == [1]
    assert len(set(answers)) == 4


def test_head_is_split_when_the_vocabulary_is_large(requests, model, tokenizer, monkeypatch):
    whole = MobileMoELM(model, tokenizer, batch_tokens=1000).loglikelihood(requests)
    monkeypatch.setattr("eval.lm.HEAD_ELEMENTS", 3 * tokenizer.vocab_size)
    recorder = Recorder(model)
    split = MobileMoELM(recorder, tokenizer, batch_tokens=1000).loglikelihood(requests)
    assert max(recorder.heads) == 3
    assert [value for value, _ in split] == pytest.approx([value for value, _ in whole], abs=1e-4)


def test_continuation_longer_than_the_context_is_scored_on_what_fits(model, tokenizer):
    lm = MobileMoELM(model, tokenizer, batch_tokens=400)
    longest = model.config.max_position_embeddings
    ((value, _),) = lm.loglikelihood([request("start", " word and" * longest)])
    assert lm.num_truncated == 1
    assert value < 0


def test_empty_continuation_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="no token to score after the context 'Water'"):
        MobileMoELM(model, tokenizer, batch_tokens=400).loglikelihood([request("Water", "")])
