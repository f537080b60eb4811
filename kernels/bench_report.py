"""What kernels.bench found, as text."""

from typing import Any

from kernels.bench_cases import COMPILED, OURS, REFERENCE
from kernels.bench_run import rate_text


def text(facts: dict[str, Any]) -> str:
    """The tables: kernels, other ways that were tried, training steps."""
    machine = facts["machine"]
    lines = [
        heading(facts),
        f"This machine: copies {machine['bytes'] / 1e9:,.0f} GB/s, multiplies {machine['flops'] / 1e12:,.2f} TFLOP/s"
        f" in {facts['dtype']}; percentages are of these.",
        "x: times as long as ours. error: of ours, relative to float32 (! beyond the tolerance); same: two runs are"
        " equal bit for bit.",
        "",
        f"{'kernel':15s} {'pass':17s} {'tokens':>7s} {'ms':>9s} {'':>14s} {'':>5s} {'reference':>9s}"
        f" {COMPILED:>13s} {'GiB':>6s} {'error':>8s} same  others",
    ]
    lines += [_line(case, name, found) for case in facts["kernels"] for name, found in case["passes"].items()]
    if why := reasons(facts):
        lines += ["", "Not measured:", *(f"  {line}" for line in why)]
    if facts["train_steps"]:
        lines += ["", f"Training of {facts['size']} on one device (python -m mm_train.bench_train --alone):"]
        lines += [_step(step) for step in facts["train_steps"]]
    return "\n".join(lines)


def heading(facts: dict[str, Any]) -> str:
    """Where this was measured; on a CPU that it is not what the kernels are for."""
    versions = f"torch {facts['torch']}, triton {facts['triton']}"
    where = f"{facts['device']}, {versions}, {facts['date']}, {facts['seconds']:.0f} s"
    if facts["on_gpu"]:
        return f"{facts['size']} in {facts['dtype']}: {where}"
    return f"NO GPU: this is the reference path at a small size ({facts['size']}, {facts['dtype']}) on {where}"


def reasons(facts: dict[str, Any]) -> list[str]:
    """Every way that has no figures, with why, and the kernels and numbers of tokens that miss them."""
    found: dict[str, list[str]] = {}
    for case in facts["kernels"]:
        for passes in case["passes"].values():
            for way, figures in passes["ways"].items():
                if "absent" in figures:
                    where = f"{case['kernel']} {case['tokens']:,}"
                    places = found.setdefault(f"{way}: {figures['absent']}", [])
                    places += [where] * (where not in places)
    return [f"{why} ({', '.join(places)})" for why, places in found.items()]


def _line(case: dict[str, Any], name: str, found: dict[str, Any]) -> str:
    ways = found["ways"]
    start = f"{case['kernel']:15s} {name:17s} {case['tokens']:7,d}"
    ours = ways[OURS]
    if "absent" in ours:
        return f"{start} {'-':>9s}  {ours['absent']}"
    wrong = "" if ours["right"] else "!"
    error = "inf" if ours["error"] is None else f"{ours['error']:.0e}"
    others = [
        f"{way} {_times(figures)}"
        for way, figures in ways.items()
        if way not in (OURS, REFERENCE, COMPILED) and "ms" in figures
    ]
    return (
        f"{start} {ours['ms']:9.3f} {rate_text(case['unit'], ours['rate']):>14s} {ours['of_machine']:5.0%}"
        f" {_times(ways[REFERENCE]):>9s} {_times(ways[COMPILED]):>13s} {_gib(ours['peak_gib']):>6s}"
        f" {error + wrong:>8s} {'yes ' if ours['repeats'] else 'NO  '}  {', '.join(others)}"
    ).rstrip()


def _times(figures: dict[str, Any]) -> str:
    """How much longer than ours, marked where the way is out of tolerance."""
    if "ms" not in figures or figures["times_ours"] is None:
        return "-"
    return f"{figures['times_ours']:.2f}x" + ("" if figures["right"] else "!")


def _gib(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _step(step: dict[str, Any]) -> str:
    name = f"  {step['dispatch']:13s}"
    if "absent" in step:
        return f"{name} {step['absent']}"
    mfu = "-" if step["mfu"] is None else f"{step['mfu']:.1%}"
    memory = step["memory_gib"].get("device", step["memory_gib"]["host"])
    lowered = " (lowered: memory was out)" if step["lowered"] else ""
    return (
        f"{name} {step['tokens_per_second']:10,.0f} tokens/s  MFU {mfu}  {memory:.1f} GiB, micro-batch of"
        f" {step['micro_batch_tokens']:,} tokens{lowered}, context {step['context']:,}, {step['dtype']}"
    )
