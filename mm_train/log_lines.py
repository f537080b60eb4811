"""Records of mm_train.metrics as one readable line each, and numbers as people read them. Torch-free."""

import math
from typing import Any

Record = dict[str, Any]


def load_factors(expert_load: list[list[float]] | None) -> list[float]:
    """For each layer, how many times the mean the busiest expert gets: 1.0 is perfect balance, 0.0 no tokens."""
    layers = [[share or 0.0 for share in layer] for layer in expert_load or []]
    return [max(shares) * len(shares) / total if (total := sum(shares)) > 0 else 0.0 for shares in layers]


def run_line(facts: Record) -> str:
    """The opening line: what is trained, where, for how long."""
    parts = [f"{facts.get('stage', 'run')}: model {facts.get('model', '?')}"]
    if facts.get("params_total"):
        parts.append(f"{short(facts['params_total'])} parameters, {short(facts.get('params_active'))} active per token")
    if facts.get("world"):
        parts.append(f"{facts['world']} rank(s), expert parallel {facts.get('expert_parallel', 1)}")
    if facts.get("total_steps"):
        parts.append(f"{facts['total_steps']} steps of {short(facts.get('global_batch_tokens'))} tokens")
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
        ("{:>5} tok/s", short(speed)),
        ("mfu {}", number(record.get("mfu"), ".1%")),
        ("mem {} GiB", number(record.get("memory_gib"), ".1f")),
        ("eta {}", eta),
    ]
    parts = [text.format(value) for text, value in columns if value is not None]
    return "  ".join([step_label(record["step"], facts), *parts])


def validation_line(record: Record, facts: Record) -> str:
    """The held-out result of one source in one line."""
    loss, bits = number(record.get("loss"), ".3f"), number(record.get("bits_per_byte"), ".3f")
    tail = f"  {bits} bits per byte" if bits is not None else ""
    return f"{step_label(record['step'], facts)}  held-out {record['source']}  loss {loss}{tail}"


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
