"""The model card (README.md) of a release folder: what it is, how it was trained, how to load it. Torch-free.

Only what is known is said: a missing fact leaves its line out. mm_train.run_facts gathers them.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Any

from mm_train import config, inventory
from mm_train.log_lines import short
from mm_train.rules import INT4_GROUP


def render(model: config.Model, format: str, facts: Mapping[str, Any]) -> str:
    """The card in Markdown, with the front matter that the Hugging Face Hub reads.

    `format` is "bf16" or "int4". Known `facts`, all optional: `license` (of the weights, an identifier of the Hub),
    `weight_bytes`, `quantisation` (how int4 numbers came about), and `stages` as mm_train.run_facts gives them.
    """
    parts = [
        _front_matter(model, format, facts),
        f"# {_line(model.name)}",
        _what_it_is(model, format),
        _table(("property", "value"), _properties(model, format, facts)),
        _training(facts.get("stages") or []),
        _loading(model, format),
        _limits(model, format, facts),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _front_matter(model: config.Model, format: str, facts: Mapping[str, Any]) -> str:
    tags = ["mobilemoe", *(["mixture-of-experts"] if model.num_local_experts else [])]
    tags += ["int4"] if format == "int4" else []
    lines = ["---", "library_name: transformers", "pipeline_tag: text-generation", "tags:"]
    lines += [f"- {tag}" for tag in tags]
    if facts.get("license"):
        lines.append(f"license: {json.dumps(str(facts['license']))}")
    return "\n".join([*lines, "---"])


def _what_it_is(model: config.Model, format: str) -> str:
    if model.num_local_experts == 0:
        kind = "A dense language model: MobileMoE's network (arXiv 2605.27358) with one MLP a layer and no experts."
    else:
        shared = " and one shared expert that every token passes" if model.intermediate_size_mlp else ""
        kind = (
            "A mixture-of-experts language model for devices, of the MobileMoE architecture (arXiv 2605.27358): every"
            f" layer has {model.num_local_experts} routed experts, of which each token uses"
            f" {model.num_experts_per_tok}{shared}. The router's scores are a {model.scoring_func}; a bias that"
            " balances the experts takes part in choosing them, not in weighing them."
        )
    weights = "4-bit weights in the format mobilemoe-int4-g32" if format == "int4" else "bfloat16 weights"
    return f"{kind} This folder holds {weights}. It was written with MobileMoE Train."


def _properties(model: config.Model, format: str, facts: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    total, active = (sum(f(model).values()) for f in (inventory.parameters, inventory.active_parameters))
    yield "parameters", f"{total:,}"
    if active != total:
        yield "of these active for a token", f"{active:,}"
    yield "context", f"{model.max_position_embeddings:,} tokens"
    yield "layers, width", f"{model.num_hidden_layers}, {model.hidden_size}"
    yield "attention heads", f"{model.num_attention_heads}, with {model.num_key_value_heads} key-value heads"
    if model.num_local_experts:
        experts = f"{model.num_local_experts} of width {model.intermediate_size}, {model.num_experts_per_tok} a token"
        yield "experts of a layer", experts
    if model.intermediate_size_mlp:
        label = "shared expert" if model.num_local_experts else "MLP of a layer"
        yield label, f"width {model.intermediate_size_mlp}"
    yield "vocabulary", f"{model.vocab_size:,} tokens; head tied to the embedding"
    if format == "int4":
        yield "format", f"int4, groups of {INT4_GROUP} with an fp16 scale; router float32, norms and bias bfloat16"
    else:
        yield "format", "bfloat16; router float32"
    if format == "int4" and facts.get("quantisation"):
        yield "quantised by", _line(facts["quantisation"])
    if facts.get("weight_bytes"):
        yield "weight files", f"{facts['weight_bytes']:,} bytes"


def _training(stages: list[Mapping[str, Any]]) -> str:
    """Stages, data and held-out results as far as they are known; empty when nothing is."""
    if not stages:
        return ""
    parts = ["## Training"]
    if stages[0].get("init_from"):
        parts.append(f"The first stage below began with the weights of `{_line(stages[0]['init_from'])}`.")
    rows = [[_line(s["stage"]), *(_count(s.get(key)) for key in ("steps", "tokens", "seq_len"))] for s in stages]
    for row, stage in zip(rows, stages, strict=True):
        row.append(", ".join(f"{_line(name)} {item['weight']:.0%}" for name, item in stage.get("data", {}).items()))
        row[0] += " (quantisation-aware)" if stage.get("quantisation_aware") else ""
    parts.append(_table(("stage", "steps", "tokens", "sequence length", "data"), rows))
    licences = {name: item.get("licence") for stage in stages for name, item in stage.get("data", {}).items()}
    known = [(_line(name), _line(licence)) for name, licence in licences.items() if licence]
    if known:
        parts.append(_table(("data source", "licence"), known))
    measured = [stage for stage in stages if stage.get("bits_per_byte")]
    sources = dict.fromkeys(name for stage in measured for name in stage["bits_per_byte"])
    if sources:
        parts.append("Bits per byte of text that was kept aside (lower is better), at the end of each stage:")
        values = [[_line(name), *(_bits(stage["bits_per_byte"].get(name)) for stage in measured)] for name in sources]
        parts.append(_table(("held out", *(_line(stage["stage"]) for stage in measured)), values))
    return "\n\n".join(parts)


def _loading(model: config.Model, format: str) -> str:
    expanded = (
        "\n\ntransformers expands the 4-bit weights when it loads them: in bfloat16 they take"
        f" {2 * sum(inventory.parameters(model).values()):,} bytes."
        if format == "int4"
        else ""
    )
    return f"""## How to use it

With transformers 5 (`trust_remote_code` runs the two Python files of this folder, also for the tokenizer):

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(FOLDER, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(FOLDER, trust_remote_code=True)
inputs = tokenizer("Once upon a time", return_tensors="pt")
print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))
```

A model that was tuned for conversations gets its `inputs` from
`tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")`. Pad prompts of different
lengths on the left: `tokenizer.padding_side = "left"`.{expanded}

With MobileMoE Train:

```bash
python -m mm_train.generate --model FOLDER --prompt "Once upon a time"
```"""


def _limits(model: config.Model, format: str, facts: Mapping[str, Any]) -> str:
    points = [
        "No evaluation of safety, bias or factual accuracy comes with this folder. What the model writes can be false"
        " or harmful.",
        "This is not a release of Meta or of the paper's authors. MobileMoE Train is an independent implementation.",
        "The tokenizer of transformers reads control strings such as `<|eot|>` in any text as control tokens: take"
        " them out of text that you do not trust. MobileMoE Train itself never does so.",
    ]
    if format == "int4" and model.num_local_experts:
        points.append(
            f"The groups of {INT4_GROUP} weights run along the input of linear layers and the embedding, but along the"
            " output of the experts. A runtime whose kernels want them along the input everywhere has to quantise the"
            " experts anew, which costs accuracy."
        )
    if format == "int4" and facts.get("quantisation") == "post-training quantisation":
        points.append("The weights were rounded to 4 bits after training, which had not prepared them for that.")
    if not facts.get("license"):
        points.append("No licence is stated for these weights. Ask whoever published them.")
    return "## Limits\n\n" + "\n".join(f"- {point}" for point in points)


def _table(head: tuple[str, ...], rows: Iterable[Iterable[str]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _line(text: object) -> str:
    """A text on one line that ends no table cell."""
    return " ".join(str(text).split()).replace("|", "\\|")


def _count(value: float | None) -> str:
    return short(value) or ""


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
