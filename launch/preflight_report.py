"""The plan of a preflight, and the verdict on what the nodes wrote: which are unfit, and why. Standard library only.

A node is unfit for what it found on itself, for silence, and for a network over which nobody reaches it while others
reach each other. Where the nodes disagree about who is to blame, nobody is, and the verdict says what failed.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from launch.preflight import PARTS, findings
from mm_train.files import write_atomic


@dataclass
class Verdict:
    bad: dict[str, str] = field(default_factory=dict)  # node -> why
    problem: str | None = None  # that no node can be blamed for
    notes: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        return not self.bad and not self.problem


def write_plan(folder: Path, addresses: Mapping[str, str], run_dir: Path, **limits: Any) -> None:
    """`limits`: port, seconds, disk_gib, scratch, gpus."""
    for part in PARTS:
        (folder / part).mkdir(parents=True, exist_ok=True)
    plan = {"nodes": list(addresses), "addresses": dict(addresses), "run_dir": str(run_dir)} | limits
    write_atomic(folder / "plan.json", json.dumps(plan).encode())


def judge(folder: Path, nodes: Sequence[str]) -> Verdict:
    """The verdict on nodes that have had their time; `folder` is that of the part."""
    verdict = Verdict()
    found = {node: findings(folder, node) for node in nodes}
    for node, finding in found.items():
        if not finding:
            verdict.bad[node] = "no answer: not started, or the run folder cannot be written there"
            continue
        own = {name: text for name, text in finding["problems"].items() if name != "all-reduce"}
        if own:
            verdict.bad[node] = "; ".join(f"{name}: {text}" for name, text in own.items())
        elif finding.get("doing") and not finding["doing"].startswith("all-reduce"):
            verdict.bad[node] = f"hangs in {finding['doing']}"
    verdict.bad |= unreachable(found, verdict.bad)
    if verdict.bad:
        return verdict
    edges = [f"{a} to {b}: {text}" for (a, b), text in failed(found).items()]
    if edges:
        verdict.problem = f"the network fails between nodes, and no single one is to blame: {', '.join(edges[:8])}"
        return verdict
    begun = any(
        "all-reduce" in {*finding["facts"], *finding["problems"], finding.get("doing")} for finding in found.values()
    )
    unfinished = [node for node in nodes if begun and "all-reduce" not in found[node]["facts"]]
    if unfinished:
        why = next((found[node]["problems"].get("all-reduce") for node in unfinished), None)
        late = [node for node in unfinished if found[node].get("doing") == "all-reduce"]  # has not even begun
        if late and len(late) < len(nodes):
            verdict.bad = dict.fromkeys(late, "did not join the others for the all-reduce in time")
        else:
            verdict.problem = (
                f"the all-reduce over {len(nodes)} nodes failed on {', '.join(unfinished[:8])}: {why or 'no end'}"
            )
        return verdict
    verdict.notes = notes(found)
    return verdict


def failed(found: Mapping[str, Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """(from, to) -> error of the connections that were tried in vain."""
    tried = {node: finding.get("facts", {}).get("neighbours") or {} for node, finding in found.items()}
    return {(a, b): result for a, results in tried.items() for b, result in results.items() if isinstance(result, str)}


def unreachable(found: Mapping[str, Mapping[str, Any]], bad: Mapping[str, str]) -> dict[str, str]:
    """Nodes all of whose connections failed, when each of them was tried with one that had others."""
    links: dict[str, dict[str, bool]] = {node: {} for node in found if node not in bad}
    for a, finding in found.items():
        for b, result in (finding.get("facts", {}).get("neighbours") or {}).items():
            if a in links and b in links and result is not None:
                good = not isinstance(result, str)
                links[a][b] = links[b][a] = good and links[a].get(b, True)
    cut_off = {node for node, ends in links.items() if ends and not any(ends.values())}
    return {
        node: f"network: no connection with {', '.join(links[node])}"
        for node in cut_off
        if any(other not in cut_off for other in links[node])
    }


def notes(found: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """What a person may want to know of nodes that have passed."""
    said = []
    drivers: dict[str, list[str]] = {}
    for node, finding in found.items():
        for gpu in finding["facts"].get("gpus") or []:
            drivers.setdefault(f"{gpu['name']}, driver {gpu['driver_version']}", []).append(node)
    if len(drivers) > 1:
        kinds = (f"{kind} on {', '.join(dict.fromkeys(nodes))}" for kind, nodes in drivers.items())
        said.append(f"GPUs differ: {'; '.join(kinds)}")
    speeds = [finding["facts"]["all-reduce"] for finding in found.values() if finding["facts"].get("all-reduce")]
    for name in ("gloo, MB/s", "nccl, MB/s"):
        values = [speed[name] for speed in speeds if name in speed]
        if values:
            said.append(
                f"all-reduce of 4 MiB over {len(found)} nodes with {name.replace(', MB/s', '')}: {min(values):g} MB/s"
            )
    return said
