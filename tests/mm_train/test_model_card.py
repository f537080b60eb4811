from dataclasses import replace

import pytest
import yaml

from mm_train import model_card


def front_matter(card: str) -> dict:
    _, front, _ = card.split("---\n", 2)
    return yaml.safe_load(front)


STAGES = [
    {
        "stage": stage,
        "steps": steps,
        "tokens": steps * 512,
        "seq_len": 64,
        "quantisation_aware": stage == "qat",
        "data": {"code": {"weight": 0.75, "licence": "PSF-2.0"}, "chat": {"weight": 0.25}},
        "bits_per_byte": {"code": bits},
    }
    for stage, steps, bits in (("pretrain", 4, 2.5), ("qat", 8, 1.5))
]
STAGES[0]["init_from"] = "seed"


def test_the_card_says_what_is_known(small_model):
    facts = {"stages": STAGES, "quantisation": "quantisation-aware training", "weight_bytes": 54321}
    card = model_card.render(small_model, "int4", facts)
    for line in (
        "# small",
        "| parameters | 181,584 |",
        "| of these active for a token | 107,856 |",
        "| context | 256 tokens |",
        "| experts of a layer | 8 of width 32, 2 a token |",
        "| quantised by | quantisation-aware training |",
        "| weight files | 54,321 bytes |",
        "The first stage below began with the weights of `seed`.",
        "| pretrain | 4 | 2.05k | 64 | code 75%, chat 25% |",
        "| qat (quantisation-aware) | 8 | 4.1k | 64 | code 75%, chat 25% |",
        "| code | PSF-2.0 |",
        "| held out | pretrain | qat |",
        "| code | 2.500 | 1.500 |",
        "transformers expands the 4-bit weights when it loads them: in bfloat16 they take 363,168 bytes.",
    ):
        assert line in card, line


def test_the_card_invents_nothing(small_model):
    card = model_card.render(small_model, "bf16", {})
    for word in ("## Training", "quantised", "4-bit", "weight files", "held out", "None", "license:"):
        assert word not in card, word
    assert "No licence is stated" in card
    sparse = model_card.render(small_model, "bf16", {"stages": [{"stage": "sft"}]})
    assert "| sft |  |  |  |  |" in sparse
    assert "licence |" not in sparse


@pytest.mark.parametrize(
    ("change", "says", "is_silent_about"),
    [
        ({}, ["8 routed experts", "shared expert that every token passes", "sigmoid"], ["dense"]),
        ({"num_local_experts": 0}, ["A dense language model", "| MLP of a layer | width 64 |"], ["routed", "active"]),
        ({"intermediate_size_mlp": 0}, ["8 routed experts, of which each token uses 2."], ["shared expert"]),
        ({"scoring_func": "softmax"}, ["scores are a softmax"], ["sigmoid"]),
    ],
)
def test_every_kind_of_network_is_described(small_model, change, says, is_silent_about):
    card = model_card.render(replace(small_model, **change), "bf16", {})
    assert [text for text in says if text not in card] == []
    assert [text for text in is_silent_about if text in card] == []


def test_the_hub_can_read_the_front_matter(small_model):
    moe = front_matter(model_card.render(small_model, "int4", {"license": "cc-by-4.0: x"}))
    assert moe == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mobilemoe", "mixture-of-experts", "int4"],
        "license": "cc-by-4.0: x",
    }
    dense = front_matter(model_card.render(replace(small_model, num_local_experts=0), "bf16", {}))
    assert dense["tags"] == ["mobilemoe"]


def test_names_cannot_break_the_tables(small_model):
    facts = {"stages": [{"stage": "a|b\nc", "data": {"d|e": {"weight": 1.0, "licence": "f\ng"}}}]}
    card = model_card.render(replace(small_model, name="x\n# y"), "bf16", facts)
    assert "\n# x # y\n" in card
    assert "| a\\|b c |  |  |  | d\\|e 100% |" in card
    assert "| d\\|e | f g |" in card
