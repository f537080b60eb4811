"""Records of mm_train.metrics as one readable line each, and numbers as people read them. Torch-free."""

import math
from typing import Any

Record = dict[str, Any]


def load_spread(expert_load: list[list[float]] | None) -> dict[str, list[float]]:
    """How evenly each layer's experts are used, from their shares of the tokens (or their counts).

    `load_max` and `load_min` are the busiest and the idlest expert over the mean, `load_cv` is the standard deviation
    over the mean. Perfect balance is 1, 1, 0; a layer without tokens has 0 everywhere.
    """
    spread: dict[str, list[float]] = {"load_max": [], "load_min": [], "load_cv": []}
    for layer in expert_load or []:
        shares = [share if share and math.isfinite(share) else 0.0 for share in layer]
        mean = sum(shares) / len(shares)
        variance = sum((share - mean) ** 2 for share in shares) / len(shares)
        for key, value in zip(spread, (max(shares), min(shares), math.sqrt(variance)), strict=True):
            spread[key].append(value / mean if mean > 0 else 0.0)
    return spread


def load_factors(expert_load: list[list[float]] | None) -> list[float]:
    """For each layer, how many times the mean the busiest expert gets: 1.0 is perfect balance, 0.0 no tokens."""
    return load_spread(expert_load)["load_max"]


def run_line(facts: Record) -> str:
    """The opening line: what is trained, where, for how long."""
    parts = [f"{facts.get('stage', 'run')}: model {facts.get('model', '?')}"]
    if facts.get("params_total"):
        parts.append(f"{short(facts['params_total'])} parameters, {short(facts.get('params_active'))} active per token")
    if facts.get("world"):
        parts.append(f"{facts['world']} rank(s), expert parallel {facts.get('expert_parallel', 1)}")
        if facts.get("tensor_parallel", 1) > 1:
            parts.append(f"tensor parallel {facts['tensor_parallel']}")
        if facts["world"] > 1 and facts.get("zero_stage") is not None:  # one process has nothing to share out
            parts.append(f"ZeRO {facts['zero_stage']}")
    if facts.get("total_steps"):
        micro_steps = f" in {facts['micro_steps']} micro-steps" if facts.get("micro_steps", 1) > 1 else ""
        parts.append(f"{facts['total_steps']} steps of {short(facts.get('global_batch_tokens'))} tokens{micro_steps}")
    return ", ".join(parts)


def train_line(record: Record, facts: Record) -> str:
    """One training interval in one line; what was not measured is left out."""
    factors = load_factors(record.get("expert_load"))
    total_steps, batch, speed = (
        facts.get("total_steps"),
        facts.get("global_batch_tokens"),
        record.get("tokens_per_second"),
    )
    eta = clock((total_steps - record["step"]) * batch / speed) if total_steps and batch and speed else None
    columns = [
        ("tok {:>5}", short(record.get("tokens"))),
        ("loss {}", number(record.get("loss"), ".3f")),
        ("lr {}", number(record.get("lr"), ".1e")),
        ("|g| {}", number(record.get("grad_norm"), ".2f")),
        ("drop {}", number(record.get("dropped_fraction"), ".1%")),
        ("load {}x", number(max(factors), ".2f") if factors else None),
        ("dead {}", record.get("dead_experts") or None),
        ("{:>5} tok/s", short(speed)),
        ("mfu {}", number(record.get("mfu"), ".1%")),
        ("mem {} GiB", number(memory_in_use(record), ".1f")),
        ("eta {}", eta),
    ]
    parts = [text.format(value) for text, value in columns if value is not None]
    return "  ".join([step_label(record["step"], facts), *parts])


def memory_in_use(record: Record) -> float | None:
    """GiB at the peak: of the GPU where there is one, else of the process."""
    memory = record.get("memory_gib")
    if isinstance(memory, dict):
        return memory.get("device", memory.get("host"))
    return memory  # of the process: a record of an earlier version


def validation_line(record: Record, facts: Record) -> str:
    """The held-out result of one source in one line."""
    loss, bits = number(record.get("loss"), ".3f"), number(record.get("bits_per_byte"), ".3f")
    tail = f"  {bits} bits per byte" if bits is not None else ""
    return f"{step_label(record['step'], facts)}  held-out {record['source']}  loss {loss}{tail}"


def evaluation_line(record: Record, facts: Record) -> str:
    """The benchmark scores of a checkpoint in one line."""
    scores = "  ".join(f"{name} {number(score, '.3f')}" for name, score in record["scores"].items())
    extent = f" ({record['limit']} items each)" if record.get("limit") else ""
    average = number(record.get("average"), ".3f")
    return f"{step_label(record['step'], facts)}  evaluation{extent}  average {average or 'none'}  {scores}".rstrip()


def skipped_line(record: Record, facts: Record) -> str:
    """A step without an update, and why."""
    return f"{step_label(record['step'], facts)}  skipped: {record['reason']}{so_far(record.get('skipped_steps'))}"


def rollback_line(record: Record, facts: Record) -> str:
    """A return to an earlier checkpoint, and why."""
    what = f"back to step {record['to_step']}: {record['reason']}{so_far(record.get('rollbacks'))}"
    return f"{step_label(record['step'], facts)}  {what}"


def alert_line(record: Record, facts: Record) -> str:
    """What a person should look at."""
    return f"{step_label(record['step'], facts)}  ALERT {record['title']}: {record['text']}"


def so_far(count: int | None) -> str:
    """ " (3 so far)"; nothing where it is not counted."""
    return f" ({count} so far)" if count else ""


def step_label(step: int, facts: Record) -> str:
    """`step  120/800`, aligned through a run."""
    total = facts.get("total_steps")
    return f"step {step:>{len(str(total))}}/{total}" if total else f"step {step}"


def number(value: float | None, spec: str) -> str | None:
    """A formatted number; None stays None, and what is not finite is spelt out."""
    if value is None:
        return None
    return format(value, spec) if math.isfinite(value) else str(value)


def short(value: float | None) -> str | None:
    """A count in three significant digits: 983 -> "983", 9834 -> "9.83k", 1263374256 -> "1.26B"."""
    if value is None or not math.isfinite(value):
        return None
    for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:  # what rounds up to the next unit belongs there
            return f"{value / size:.3g}{unit}"
    return f"{value:.3g}"


def clock(seconds: float) -> str:
    """A duration as mm:ss, h:mm:ss or d days h:mm:ss."""
    days, rest = divmod(round(seconds), 86400)
    hours, rest = divmod(rest, 3600)
    minutes, rest = divmod(rest, 60)
    if days:
        return f"{days}d {hours}:{minutes:02d}:{rest:02d}"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes:02d}:{rest:02d}"
