"""What a recorded value is called on Weights & Biases and on the dashboard: the one table. Torch-free.

A name begins with its group. "*" stands for the keys of a mapping (parts of the network, sources, phases), in
"layer_*" for the number of a layer, and in "validation/*" for the source.
"""

from typing import Any

from mm_train.log_lines import Record, load_spread

# Where the time of a step goes (mm_train.timing); what no phase took is "other".
PHASES = ("data", "forward", "backward", "all_to_all", "optimizer", "checkpoint", "validation")

NAMES: dict[str, dict[str, str]] = {  # kind of record -> key -> name
    "train": {
        "tokens": "train/tokens",
        "loss": "train/loss",
        "lr": "train/lr",
        "grad_norm": "grad_norm/total",
        "grad_norm_parts": "grad_norm/*",
        "z_loss": "router/z_loss",
        "router_entropy": "router/entropy/layer_*",
        "router_entropy_share": "router/entropy_share",
        "dropped_fraction": "router/dropped_fraction",
        "load_max": "experts/load_max/layer_*",
        "load_min": "experts/load_min/layer_*",
        "load_cv": "experts/load_cv/layer_*",
        "dead_experts": "experts/dead",
        "tokens_per_second": "throughput/tokens_per_second",
        "tokens_per_second_per_gpu": "throughput/tokens_per_second_per_gpu",
        "model_flops_per_second": "throughput/model_flops_per_second",
        "mfu": "throughput/mfu",
        "step_seconds": "time/step",
        "phase_seconds": "time/*",
        "seconds": "time/since_start",
        "data_mixture": "data/*",
        "memory_gib": "memory/*",
        "skipped_steps": "faults/skipped_steps",
        "rollbacks": "faults/rollbacks",
    },
    "validation": {"loss": "validation/*/loss", "bits_per_byte": "validation/*/bits_per_byte"},
    "evaluation": {
        "scores": "evaluation/*",
        "average": "evaluation/average",
        "bits_per_byte": "evaluation_bits/*",
    },
    "checkpoint": {
        "seconds": "checkpoint/seconds",
        "stalled_seconds": "checkpoint/stalled_seconds",
        "bytes": "checkpoint/bytes",
    },
    "skipped": {"skipped_steps": "faults/skipped_steps"},
    "rollback": {"rollbacks": "faults/rollbacks"},
    "alert": {"alerts": "faults/alerts"},
}

GROUPS = tuple(dict.fromkeys(name.split("/")[0] for names in NAMES.values() for name in names.values()))


def named(record: Record) -> dict[str, float | None]:
    """A record's numbers under their names, one level deep; None where a value was not measured or is not finite.

    A number of a training record that the table does not know goes to "train/". Records of earlier versions are read
    as if they were of this one.
    """
    table = NAMES.get(record["kind"], {})
    values = (_as_of_now(record) if record["kind"] == "train" else record).items()
    flat: dict[str, float | None] = {}
    for key, value in values:
        name = table.get(key)
        if name is None and record["kind"] == "train" and key not in ("kind", "step", "expert_load"):
            name = f"train/{key}"
        if name is None:
            continue
        if record["kind"] == "validation":
            name = name.replace("*", record["source"])
        for part, number in _parts(value):
            filled = name.replace("*", part) if "*" in name else "/".join(filter(None, (name, part)))
            flat[filled] = number
    return flat


def _as_of_now(record: Record) -> Record:
    """A training record with what earlier versions left out or wrote otherwise."""
    load, memory = record.get("expert_load"), record.get("memory_gib")
    if load is not None and "load_max" not in record:
        dead = sum(share == 0 for layer in load for share in layer)
        record = record | load_spread(load) | {"dead_experts": record.get("dead_experts", dead)}
    if isinstance(memory, float):
        record = record | {"memory_gib": {"host": memory}}
    return record


def _parts(value: Any) -> list[tuple[str, float | None]]:
    """(what fills the star, number) of a value: keys of a mapping, numbers of layers, or nothing; text is no number."""
    if isinstance(value, dict):
        return [(str(key), number) for key, item in value.items() for _, number in _parts(item)]
    if isinstance(value, list | tuple):
        return [(f"{index:02d}", number) for index, item in enumerate(value) for _, number in _parts(item)]
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return [("", value)]
    return []
