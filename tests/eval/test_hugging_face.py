import pytest
import torch
import transformers

from eval.hugging_face import HuggingFaceEngine, load
from eval.lm import LM
from eval.lm_eval_path import TheirPath
from eval.suite import load_suites
from eval.verify import compare
from mm_train.cli import UserError

BENCHMARKS = {b.name: b for b in load_suites()["paper14"].benchmarks}


@pytest.fixture(scope="module")
def llama(tokenizer, tmp_path_factory):
    """A folder as transformers writes it, of another architecture."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=400,
        initializer_range=0.2,
        bos_token_id=tokenizer.bos_id,
        eos_token_id=tokenizer.eos_id,
        pad_token_id=tokenizer.pad_id,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save(folder)
    return folder


@pytest.fixture(scope="module")
def theirs(llama):
    return TheirPath(llama, batch_size=4)


@pytest.mark.parametrize("name", ["hellaswag", "boolq", "winogrande", "mmlu", "nq", "drop"])
@pytest.mark.parametrize("batch_tokens", [1, 1500])
def test_equals_lm_evals_own_path(name, batch_tokens, llama, theirs, mirror):
    engine = HuggingFaceEngine(*load(llama, torch.float32, "cpu"), batch_tokens)
    found = compare(BENCHMARKS[name], mirror, LM(engine), theirs, items=3, max_new=12)
    assert found.equal, found
    assert found.requests >= 1


def test_a_folder_that_transformers_cannot_load_is_refused(tmp_path):
    with pytest.raises(UserError, match="transformers cannot load"):
        load(tmp_path, torch.float32, "cpu")
