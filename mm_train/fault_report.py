"""What breaking a run has shown: the comparison with the undisturbed run, and the table."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from signal import Signals
from statistics import median
from typing import Any

from mm_train.checkpoint.folders import complete, step_of
from mm_train.fault_run import Blow, Timing
from mm_train.log_lines import clock

KINDS = ("train", "validation", "skipped")  # records that say what the training did
# What they say of the machine instead; everything else must be the same.
OF_THE_MACHINE = {
    "seconds",
    "step_seconds",
    "phase_seconds",
    "tokens_per_second",
    "tokens_per_second_per_gpu",
    "model_flops_per_second",
    "mfu",
    "memory_gib",
}
SHOWN_PROBLEMS = 5  # of one sort


@dataclass
class Outcome:
    """All that is known in the end."""

    words: list[str]  # configs and overrides
    ranks: int
    seed: int
    total_steps: int
    timing: Timing
    undisturbed_seconds: float
    broken_seconds: float = 0.0
    starts: int = 0
    start_seconds: list[float] = field(default_factory=list)  # from a start to the end of its first step
    steps_done: int = 0  # by all starts together
    blows: list[Blow] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def log_records(run_dir: Path) -> list[dict[str, Any]]:
    """What a run has logged of KINDS, without OF_THE_MACHINE, repeated steps included."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n")[:-1]
    records = [record for record in map(json.loads, lines) if record["kind"] in KINDS]
    return [{key: value for key, value in record.items() if key not in OF_THE_MACHINE} for record in records]


def compare_logs(reference: Path, broken: Path) -> list[str]:
    """Where the log of the broken run is not that of the reference, to the last bit; steps done twice count twice."""
    problems = []
    expected: dict[str, list[dict[str, Any]]] = {}
    for record in log_records(reference):  # a step can come twice, with other data, after a rollback
        expected.setdefault(_what(record), []).append(record)
    found = log_records(broken)
    for record in found:
        wanted = expected.get(_what(record), [])
        if not wanted:
            problems.append(f"{_what(record)}: not in the log of the undisturbed run")
        elif record not in wanted:
            want = wanted[-1]
            names = [name for name in want | record if record.get(name) != want.get(name)]
            values = f"{record.get(names[0])!r:.40} instead of {want.get(names[0])!r:.40}"
            problems.append(f"{_what(record)}: {', '.join(names)} differ: {values}")
    there = {_what(record) for record in found}
    missing = [what for what in expected if what not in there]
    if missing:
        problems.append(f"{len(missing)} records are missing in the log, the first is {missing[0]}")
    return _shortened(problems)


def _what(record: dict[str, Any]) -> str:
    """Kind, source if there is one, and step."""
    source = f" of {record['source']}" if "source" in record else ""
    return f"{record['kind']}{source}, step {record['step']}"


def compare_checkpoints(reference: Path, broken: Path) -> list[str]:
    """Where the last checkpoints differ, in any bit of any tensor."""
    import torch

    from mm_train.checkpoint.reader import Reader

    folders = [next(iter(complete(run)), None) for run in (reference, broken)]
    if None in folders or step_of(folders[0]) != step_of(folders[1]):  # type: ignore[arg-type]
        names = " and ".join(folder.name if folder else "no checkpoint" for folder in folders)
        return [f"the last checkpoints are {names}"]
    want, found = (Reader(folder).verify() for folder in folders if folder)
    problems = []
    for name in want.names():
        for kind in want.kinds_of[name]:
            a, b = (reader.read(name, kind).view(torch.int32) for reader in (want, found))
            if not torch.equal(a, b):
                problems.append(f"{kind} of {name}: {int((a != b).sum())} of {a.numel()} elements differ")
    if not torch.equal(want.rng_state(), found.rng_state()):
        problems.append("the random states differ")
    return _shortened(problems)


def _shortened(problems: list[str]) -> list[str]:
    more = len(problems) - SHOWN_PROBLEMS
    return problems if more <= 0 else [*problems[:SHOWN_PROBLEMS], f"and {more} more like it"]


def blow_line(number: int, blow: Blow) -> str:
    """One blow, for the console."""
    who = {"one": f"rank {blow.rank}", "all": "all ranks", "launcher": "the launcher"}[blow.target]
    when = "while it started" if blow.struck_after is None else f"after step {blow.struck_after}"
    partial = ", a checkpoint half written" if blow.left_partial else ""
    name = Signals(blow.signal).name
    return f"{number:>3}  {name} to {who} {when}{partial}; newest complete checkpoint: step {blow.newest}"


def report_lines(outcome: Outcome) -> list[str]:
    """The table, and what is wrong."""
    blows = outcome.blows
    kills = [blow for blow in blows if blow.is_kill]
    rows = {"kills (SIGKILL)": f"{len(kills)}: {_targets(kills)}" if kills else "0"}
    rows["  during a checkpoint write"] = f"{sum(b.left_partial for b in kills)} (half of one was left behind)"
    rows["  during start-up"] = f"{sum(b.struck_after is None for b in kills)} (before the run went on)"
    for kind, title in (("hang", "hangs (SIGSTOP)"), ("stop", "stops (SIGTERM, SIGUSR1)")):
        some = [blow for blow in blows if blow.kind == kind]
        if some:
            end = "ended by the watchdog" if kind == "hang" else "saved and left"
            rows[title] = f"{len(some)}, {end} after {median(b.seconds for b in some):.1f} s (median)"
    rows["restarts"] = str(outcome.starts - 1)
    if outcome.start_seconds:
        rows["  start to end of first step"] = f"{median(outcome.start_seconds):.1f} s (median)"
    rows["steps"] = str(outcome.total_steps)
    if outcome.steps_done:
        rows["steps"] += f", and {outcome.steps_done - outcome.total_steps} done again"
    rows["a checkpoint write takes"] = f"{outcome.timing.write:.3f} s"
    rows["wall time"] = f"{clock(outcome.broken_seconds)}, undisturbed {clock(outcome.undisturbed_seconds)}"
    if outcome.problems:
        rows["result"] = "DIFFERENT"
    else:
        rows["checkpoint chosen"] = "every time the newest complete one"
        rows["result"] = "log and last checkpoint are those of the undisturbed run, bit for bit"
    width = max(map(len, rows))
    return [f"{title:<{width}}  {text}" for title, text in rows.items()] + [f"problem: {p}" for p in outcome.problems]


def _targets(kills: list[Blow]) -> str:
    names = {"one": "of one rank", "all": "of all ranks", "launcher": "of the launcher"}
    counts = Counter(blow.target for blow in kills)
    return ", ".join(f"{counts[target]} {name}" for target, name in names.items() if counts[target])
