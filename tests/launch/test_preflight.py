"""Preflight: what a node finds on itself, and whom the verdict blames."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launch import preflight
from launch.preflight_report import judge, write_plan

ROOT = Path(__file__).parents[2]
LIMITS = {"port": 29511, "seconds": 60, "disk_gib": 0.001, "gpus": 0, "scratch": ""}


def start(folder: Path, part: str, nodes: list[str], path: str = "") -> list[subprocess.Popen]:
    """The command as each of the nodes, all of them here."""
    command = [sys.executable, "-m", "launch.preflight", folder, part]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{path}:{os.environ['PATH']}"}
    return [
        subprocess.Popen(command, cwd=ROOT, env=environment | {"SLURMD_NODENAME": node}, stderr=subprocess.PIPE)
        for node in nodes
    ]


def finish(processes: list[subprocess.Popen]) -> list[int]:
    for process in processes:
        process.communicate(timeout=120)
    return [process.returncode for process in processes]


def here(*nodes: str) -> dict[str, str]:
    return dict.fromkeys(nodes, "127.0.0.1")


def found(folder: Path, node: str, neighbours: dict | None = None, **more) -> None:
    """What a node would have left."""
    facts = {"disk": {}} | ({"neighbours": neighbours} if neighbours is not None else {})
    finding = {"node": node, "problems": {}, "facts": facts, "doing": None} | more
    (folder / f"{node}.json").write_text(json.dumps(finding))


def test_nodes_that_are_fit_find_each_other_and_add_up(tmp_path):
    write_plan(tmp_path, here("a", "b"), tmp_path, **LIMITS)
    assert finish(start(tmp_path, "single", ["a", "b"])) == [0, 0]
    assert judge(tmp_path / "single", ["a", "b"]).ok
    assert preflight.findings(tmp_path / "single", "a")["facts"]["neighbours"]["b"] < 10
    assert finish(start(tmp_path, "together", ["a", "b"])) == [0, 0]
    verdict = judge(tmp_path / "together", ["a", "b"])
    assert verdict.ok
    assert "all-reduce of 4 MiB over 2 nodes with gloo" in verdict.notes[0]


def test_what_a_node_lacks_is_said(tmp_path):
    scratch = f"{tmp_path}/$SLURMD_NODENAME"
    (tmp_path / "a").mkdir()
    write_plan(tmp_path, here("a", "b"), tmp_path, **LIMITS | {"scratch": scratch})
    assert finish(start(tmp_path, "single", ["a", "b"])) == [0, 1]
    verdict = judge(tmp_path / "single", ["a", "b"])
    assert verdict.bad == {"b": f"scratch: {tmp_path}/b (MM_SCRATCH) cannot be written: No such file or directory"}
    write_plan(tmp_path, here("a"), tmp_path, **LIMITS | {"disk_gib": 1e9})
    assert finish(start(tmp_path, "single", ["a"])) == [1]
    assert "GiB are free" in judge(tmp_path / "single", ["a"]).bad["a"]


def test_a_run_folder_that_is_not_there_is_one_line(tmp_path):
    (process,) = start(tmp_path / "elsewhere", "single", ["a"])
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1
    assert errors.decode().startswith("a: the run folder is not usable here: No such file")
    assert "no answer" in judge(tmp_path / "elsewhere", ["a"]).bad["a"]


GPU = "NVIDIA H100, 570.1, {clock}, 1980, 45, {ecc}, {slow}, No"
UNKNOWN = "clocks_throttle_reasons.hw_slowdown"  # to this driver


@pytest.mark.parametrize(
    ("gpus", "rows", "why"),
    [
        ([("1980", "0", "Not Active")] * 2, "0000, No, No", None),
        ([("1980", "[N/A]", "[N/A]")] * 2, "0000, [N/A], [N/A]", None),
        ([("1980", "0", "Not Active")], "0000, No, No", "gpus: 1 GPUs instead of 2"),
        ([("1980", "0", "Not Active"), ("1980", "3", "Not Active")], "0, No, No", "GPU 1 (NVIDIA H100): ecc.errors"),
        ([("1980", "0", "Not Active"), ("345", "0", "Active")], "0, No, No", "clocks_event_reasons.hw_slowdown"),
        ([("1980", "0", "Not Active")] * 2, "0, 0, 1", "GPU 0: rows of its memory"),
    ],
)
def test_gpus_are_judged_by_what_nvidia_smi_says(tmp_path, gpus, rows, why):
    lines = [GPU.format(clock=clock, ecc=ecc, slow=slow) for clock, ecc, slow in gpus]
    script = tmp_path / "bin/nvidia-smi"
    script.parent.mkdir()
    answer = "\n".join(f"echo '{line}'" for line in lines)
    remapped = f"if [[ $1 == *remapped* ]]; then echo '{rows}'; exit; fi"
    refused = (
        f"""if [[ $1 == *{UNKNOWN}* ]]; then echo 'Field "{UNKNOWN}" is not a valid field to query.'; exit 2; fi"""
    )
    script.write_text(f"#!/bin/bash\n{remapped}\n{refused}\n{answer}\n")
    script.chmod(0o755)
    write_plan(tmp_path, here("a"), tmp_path, **LIMITS | {"gpus": 2})
    status = finish(start(tmp_path, "single", ["a"], path=str(script.parent)))
    assert status == [1 if why else 0]
    bad = judge(tmp_path / "single", ["a"]).bad
    assert why in bad["a"] if why else bad == {}


def test_a_driver_that_is_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(preflight.Unfit, match="no nvidia-smi"):
        preflight.gpus(1)


FAILS = "Connection refused"


@pytest.mark.parametrize(
    ("neighbours", "bad", "problem"),
    [
        # Of three nodes in a ring each tries both others.
        ({"a": {"b": 0.1, "c": FAILS}, "b": {"c": FAILS, "a": 0.1}, "c": {"a": FAILS, "b": FAILS}}, ["c"], None),
        ({"a": {"b": 0.1, "c": 0.1}, "b": {"c": FAILS, "a": 0.1}, "c": {"a": 0.1, "b": FAILS}}, [], "b to c"),
        ({"a": {"b": FAILS}, "b": {"a": FAILS}}, [], "no single one is to blame"),
        ({"a": {"b": 0.1}, "b": {"a": 0.1}}, [], None),
    ],
)
def test_a_network_is_blamed_on_the_node_that_nobody_reaches(tmp_path, neighbours, bad, problem):
    for node, tried in neighbours.items():
        found(tmp_path, node, tried)
    verdict = judge(tmp_path, list(neighbours))
    assert list(verdict.bad) == bad
    assert problem in (verdict.problem or "") if problem else verdict.problem is None


def test_nodes_that_hang_are_named(tmp_path):
    found(tmp_path, "a", {"b": 0.1, "c": None})
    found(tmp_path, "b", {"c": None, "a": 0.1})
    found(tmp_path, "c", doing="gpus")
    assert judge(tmp_path, ["a", "b", "c", "d"]).bad == {
        "c": "hangs in gpus",
        "d": "no answer: not started, or the run folder cannot be written there",
    }


def test_an_all_reduce_that_fails(tmp_path):
    for node in ("a", "b"):
        found(tmp_path, node, problems={"all-reduce": "DistStoreError: timed out"}, facts={})
    found(tmp_path, "c", doing="all-reduce", facts={})
    assert judge(tmp_path, ["a", "b", "c"]).bad == {"c": "did not join the others for the all-reduce in time"}
    for node in ("a", "b", "c"):
        found(tmp_path, node, problems={"all-reduce": "nccl: the sum over all nodes is 4.0"}, facts={})
    assert "the all-reduce over 3 nodes failed on a, b, c: nccl" in judge(tmp_path, ["a", "b", "c"]).problem
