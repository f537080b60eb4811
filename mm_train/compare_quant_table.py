"""The comparison of mm_train.compare_quant as tables. Works on its JSON, without torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

Model = Mapping[str, Any]  # a compare_quant.Measured as JSON

NAMES = {
    "bf16": "bf16",
    "ptq": "PTQ of it",
    "control": "control: bf16, trained on as QAT",
    "ptq-control": "PTQ of the control",
    "qat": "QAT",
}
WITHOUT = {"ptq": "bf16", "ptq-control": "control", "qat": "control"}  # what a quantised model is compared with


def summary(models: Sequence[Model]) -> dict[str, Any]:
    """Losses beside those without quantisation, by kind, and how QAT's gap compares with PTQ's.

    Gaps are of the held-out loss in nats per token, each seed against its own reference. `qat_gap_over_ptq_gap` has one
    number a seed for each source, and under "all" for the mean over the sources; without control runs both gaps are to
    the bf16 model, which has seen fewer tokens than QAT. None where PTQ loses nothing.
    """
    sources = list(models[0]["held_out"])
    found = {name: gaps(models, [name]) for name in sources} | {"all": gaps(models, sources)}
    losses = {kind: [mean_loss(model, sources) for model in models if model["kind"] == kind] for kind in NAMES}
    ratios = {name: over(gap["qat"], gap["ptq-control"] or gap["ptq"] * len(gap["qat"])) for name, gap in found.items()}
    return {"loss": losses, "gap": found["all"], "qat_gap_over_ptq_gap": ratios}


def gaps(models: Sequence[Model], sources: Sequence[str]) -> dict[str, list[float]]:
    """By kind, how much more loss each quantised model has on these sources than its reference."""
    losses = {kind: [mean_loss(model, sources) for model in models if model["kind"] == kind] for kind in NAMES}
    found: dict[str, list[float]] = {}
    for kind, reference in WITHOUT.items():
        base = losses[reference] or losses["bf16"] * len(losses[kind])
        found[kind] = [loss - without for loss, without in zip(losses[kind], base, strict=True)]
    return found


def over(gap: Sequence[float], other: Sequence[float]) -> list[float | None]:
    """Quotients; None where the other gap is none."""
    return [mine / theirs if theirs > 0 else None for mine, theirs in zip(gap, other, strict=True)]


def mean_loss(model: Model, sources: Sequence[str]) -> float:
    """Held-out loss, mean over sources."""
    return sum(model["held_out"][name]["loss"] for name in sources) / len(sources)


def markdown(facts: Mapping[str, Any]) -> str:
    """All of the comparison: one table of losses, routing and benchmarks, one of routing by layer."""
    models, found = facts["models"], facts["summary"]
    kinds = [kind for kind in NAMES if any(model["kind"] == kind for model in models)]
    of = {kind: [model for model in models if model["kind"] == kind] for kind in kinds}
    sources = list(models[0]["held_out"])
    benchmarks = list(dict.fromkeys(name for model in models for name in model["scores"]))
    layers = range(max(len(model["changed_from_bf16"]) for model in models))
    axis = facts["quant"]["expert_group_axis"]
    activations = "int8 dynamic activations" if facts["quant"]["activations_int8"] else "float activations"

    head = ["model", "seeds", *(f"{name}, bits/byte" for name in sources), "loss", "loss - without int4"]
    head += ["routing changed from bf16", "from control", *benchmarks]
    rows = [head]
    for kind in kinds:
        row = [NAMES[kind], str(len(of[kind]))]
        row += [spread([m["held_out"][name]["bits_per_byte"] for m in of[kind]], ".4f") for name in sources]
        row += [spread(found["loss"][kind], ".4f"), spread(found["gap"].get(kind, []), "+.4f")]
        row += [spread([mean(m[key]) for m in of[kind] if m[key]], ".2%") for key in CHANGED]
        row += [spread([m["scores"][name] for m in of[kind] if name in m["scores"]], ".3f") for name in benchmarks]
        rows.append(row)
    by_layer = [["routing changed", *(f"layer {layer}" for layer in layers)]]
    for key, words in zip(CHANGED, ("from bf16", "from control"), strict=True):
        for kind in kinds:
            shares = [model[key] for model in of[kind] if model[key]]
            if shares:
                cells = [spread([share[layer] for share in shares], ".2%") for layer in layers]
                by_layer.append([f"{NAMES[kind]}, {words}", *cells])

    ratios = {
        name: spread([ratio for ratio in seeds if ratio is not None], ".2f") or "PTQ loses nothing"
        for name, seeds in found["qat_gap_over_ptq_gap"].items()
    }
    lines = [f"# int4-g32, experts grouped along {axis}, {activations}", "", *table(rows), ""]
    by_source = ", ".join(f"{name} {ratios[name]}" for name in sources)
    lines += [f"QAT's gap over PTQ's: {ratios['all']}; of each source: {by_source}."]
    if "control" in kinds:
        lines += ["Both gaps are to the control, which has trained on the same tokens as QAT without quantisation."]
    else:
        lines += ["Both gaps are to the bf16 model, which has trained on fewer tokens than QAT: add --control runs."]
    lines += ["A spread is the mean (lowest..highest) over seeds. Loss: nats per scored token, mean over the sources."]
    lines += [f"Note: {note}" for note in facts["notes"]]
    return "\n".join([*lines, "", *table(by_layer), ""])


CHANGED = ("changed_from_bf16", "changed_from_control")


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def spread(values: Sequence[float], spec: str) -> str:
    """One number, or mean (lowest..highest) of several; nothing for none."""
    show: Callable[[float], str] = lambda value: format(value, spec)  # noqa: E731
    if not values:
        return ""
    if len(values) == 1:
        return show(values[0])
    return f"{show(mean(values))} ({show(min(values))}..{show(max(values))})"


def table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows as a Markdown table."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return [lines[0], "|" + "---|" * len(rows[0]), *lines[1:]]
