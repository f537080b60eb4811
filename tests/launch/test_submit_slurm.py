"""Chains and arrays on a real SLURM: what is queued, what a failure does to the rest, and how it goes on."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from launch.slurm_queue import OVER
from mm_train.metrics import read_metrics
from mm_train.shards import ShardReader
from tests.mm_train.scaling_law.conftest import HEAD

ROOT = Path(__file__).parents[2]
STAGES = ("pretrain", "midtrain", "sft", "qat")


@pytest.fixture
def site(tmp_path) -> Path:
    path = tmp_path / "site.env"
    path.write_text(f"MM_PARTITION=train\nMM_GPUS_PER_NODE=0\nMM_TIME=10\nMM_PREFLIGHT=0\nMM_PYTHON={sys.executable}\n")
    return path


@pytest.fixture
def launch(cluster, site):
    """A function: a command of launch/ on the cluster; returns the finished process."""

    def run(module: str, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", f"launch.{module}", *map(str, words)]
        command += ["--site", str(site)] if module == "submit" else []
        return subprocess.run(command, cwd=ROOT, env=cluster.environment, capture_output=True, text=True, timeout=120)

    return run


def queued(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """Job ids by step, of a submission."""
    assert done.returncode == 0, done.stderr
    (line,) = (line for line in done.stdout.splitlines() if line.startswith("queued: "))
    return dict(pair.split(" ") for pair in line.removeprefix("queued: ").split(", "))


def over(cluster, job: str, timeout: float = 120) -> list[str]:
    """The states of a job, or of all tasks of an array, once they are over."""

    def states() -> list[str] | None:
        lines = cluster.run("scontrol", "--oneliner", "show", "job", job).splitlines()
        found = [line.split("JobState=")[1].split()[0] for line in lines if line]
        return found if set(found) <= OVER else None

    return cluster.until(states, timeout, f"job {job}")


@pytest.fixture
def recipe(tmp_path, small_model, data_set) -> Path:
    """Four stages of two steps each; sft reads a data set of its own, which a test can damage."""
    shutil.copytree(data_set, tmp_path / "for-sft")
    (tmp_path / "model.yaml").write_text(yaml.safe_dump({"model": dataclasses.asdict(small_model)}))
    for name in STAGES:
        path = tmp_path / "for-sft" if name == "sft" else data_set
        stage = {
            "data": {"path": str(path), "mixture": {"code": 3, "chat": 1}, "validation": ["code"], "seq_len": 64},
            "train": {"tokens": 2 * 512, "global_batch_tokens": 512, "micro_batch_size": 4, "validation_tokens": 64},
            "optim": {"warmup_steps": 1},
            "checkpoint": {"every": 1},
            "log": {"every": 1, "wandb": "disabled"},
            "quant": {"enabled": name == "qat"},
        }
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(stage))
    stages = {name: {"config": str(tmp_path / f"{name}.yaml")} for name in STAGES}
    content = {"out": str(tmp_path / "runs"), "model": str(tmp_path / "model.yaml"), "stages": stages, "export": {}}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
    return tmp_path / "recipe.yaml"


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_chain_whose_stage_fails_is_cancelled_from_there_repaired_and_resumed(cluster, launch, recipe, tmp_path):
    """Two nodes a stage. sft's data set is damaged: qat and the export are cancelled, and nothing is requeued."""
    runs, shard = tmp_path / "runs", next((tmp_path / "for-sft/code/train").glob("*.tar"))
    whole = shard.read_bytes()
    shard.write_bytes(whole[:600] + bytes(len(whole) - 600))
    words = (recipe, "--nodes", "2", "parallel.expert_parallel=2")
    first = queued(launch("submit", *words))
    assert list(first) == [*STAGES, "export"]

    again = launch("submit", *words)  # as long as it is queued
    assert again.returncode == 2
    assert f"{runs} is queued already: jobs " in again.stderr
    assert f"{first['qat']} (qat, PENDING)" in again.stderr

    states = {name: over(cluster, job, 300) for name, job in first.items()}
    assert states == {
        "pretrain": ["COMPLETED"],
        "midtrain": ["COMPLETED"],
        "sft": ["FAILED"],
        "qat": ["CANCELLED"],
        "export": ["CANCELLED"],
    }
    status = launch("status", recipe).stdout
    assert f"sft failed: job {first['sft']}, FAILED" in status
    assert str(shard.parent) in status  # what summary.log says of it

    shard.write_bytes(whole)
    kept = (runs / "midtrain/DONE").stat().st_mtime_ns
    second = queued(launch("submit", *words))
    assert list(second) == ["sft", "qat", "export"]
    assert [over(cluster, job, 300) for job in second.values()] == [["COMPLETED"]] * 3
    assert (runs / "midtrain/DONE").stat().st_mtime_ns == kept
    exported = json.loads((runs / "export/config.json").read_text())
    assert "int4" in json.dumps(exported)
    assert [read_metrics(runs / name)["run"][-1]["world"] for name in STAGES] == [2] * 4
    status = launch("status", recipe).stdout
    assert status.count("COMPLETED") == 3
    assert "failed" not in status

    done = launch("submit", *words)
    assert done.returncode == 0
    assert "nothing is left to do" in done.stdout


def data_config(folder: Path, vocab_size: int = 600) -> Path:
    """A data set of some modules of the standard library, in FOLDER/set."""
    texts = sorted(Path(dataclasses.__file__).parent.glob("te*.py"))
    source = {"kind": "files", "paths": list(map(str, texts)), "licence": "PSF-2.0", "domain": "code"}
    content = {
        "out": str(folder / "set"),
        "tokenizer": {"kind": "train_bpe", "vocab_size": vocab_size},
        "validation_fraction": 0.2,
        "part_bytes": 20_000,
        "sources": {"code": source},
    }
    (folder / "data.yaml").write_text(yaml.safe_dump(content))
    return folder / "data.yaml"


def sweep_file(folder: Path, data_set: Path, points: str) -> Path:
    """A sweep of small networks, in FOLDER/out."""
    (folder / "sweep.yaml").write_text(HEAD.format(out=folder / "out", data=data_set) + points)
    return folder / "sweep.yaml"


def test_a_data_set_is_prepared_by_an_array(cluster, launch, tmp_path):
    data_config(tmp_path)
    ids = queued(launch("submit", "--data", tmp_path / "data.yaml", "--tasks", "3"))
    assert over(cluster, ids["data-data"]) == ["COMPLETED"] * 3
    assert ShardReader(tmp_path / "set/code/train").manifest.num_documents > 1
    assert (tmp_path / "set/dataset.json").is_file()
    assert len(list((tmp_path / "set/slurm").glob("*_?.log"))) == 3
    assert "3 COMPLETED" in launch("status", tmp_path / "set").stdout


def test_what_this_cluster_does_not_have_is_refused_before_anything_is_queued(cluster, launch, recipe, site, tmp_path):
    site.write_text(site.read_text().replace("=train", "=trian"))
    refused = launch("submit", recipe)
    assert refused.returncode == 2
    assert "MM_PARTITION=trian: this cluster has no such partition (did you mean train?)" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1
    site.write_text(site.read_text().replace("=trian", "=train") + "MM_ACCOUNT=lab\nMM_SBATCH_ARGS=--constraint=h100\n")
    refused = launch("submit", recipe)
    assert refused.returncode == 2
    assert "SLURM would refuse the job pretrain: allocation failure: Invalid feature specification" in refused.stderr
    assert "note: MM_ACCOUNT=lab could not be looked up" in refused.stdout  # there is no accounting
    assert not (tmp_path / "runs").exists()
    assert cluster.run("squeue", "-h") == ""


def test_a_node_that_is_down_is_waited_for(cluster, launch, recipe):
    cluster.run("scontrol", "update", "nodename=node2", "state=drain", "reason=test")
    try:
        nodes, batch = len(cluster.nodes), 256 * len(cluster.nodes)
        words = [f"train.global_batch_tokens={batch}", f"train.tokens={2 * batch}", "--until", "pretrain"]
        planned = launch("submit", recipe, "--nodes", str(nodes), "--dry-run", *words)
    finally:
        cluster.run("scontrol", "update", "nodename=node2", "state=resume")
    assert planned.returncode == 0, planned.stderr
    assert "(1 nodes of the cluster are down or drained: it waits for them)" in planned.stdout
    cluster.wait_idle()


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_stage_waits_for_the_array_that_prepares_its_data(cluster, launch, recipe, tmp_path):
    data_config(tmp_path, vocab_size=512)
    content = yaml.safe_load(recipe.read_text())
    content["stages"]["pretrain"]["data"] = str(tmp_path / "data.yaml")
    recipe.write_text(yaml.safe_dump(content, sort_keys=False))
    mixture = [f"data.path={tmp_path / 'set'}", "data.mixture.chat=0", "--until", "pretrain"]
    refused = launch("submit", recipe, *mixture)
    assert refused.returncode == 2
    assert f"stage pretrain: data set {tmp_path / 'set'} is not there: --prepare, or first " in refused.stderr
    ids = queued(launch("submit", recipe, *mixture, "--prepare", "--tasks", "2"))
    assert list(ids) == ["data-pretrain", "pretrain"]
    assert cluster.job(ids["pretrain"])["Dependency"].startswith(f"afterok:{ids['data-pretrain']}")
    assert over(cluster, ids["data-pretrain"], 300) == ["COMPLETED"] * 2
    assert over(cluster, ids["pretrain"], 300) == ["COMPLETED"]
    assert "2 COMPLETED" in launch("status", tmp_path / "runs").stdout


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_array_of_more_tasks_than_can_run_at_once(cluster, site, tmp_path):
    """One at a time: each does its part, waits in vain, and goes back into the queue until the set is there."""
    config = data_config(tmp_path)
    log = tmp_path / "set/slurm"
    log.mkdir(parents=True)
    words = ["launch/slurm_data_prep.sh", config, "--world", "3", "--wait", "1"]
    job = cluster.submit("--array=0-2%1", f"--output={log}/%A_%a.log", *words, cwd=ROOT, MM_SITE=str(site))
    assert over(cluster, job, 300) == ["COMPLETED"] * 3
    assert (tmp_path / "set/dataset.json").is_file()
    restarts = [
        line.split("Restarts=")[1].split()[0] for line in cluster.run("scontrol", "-o", "show", "job", job).splitlines()
    ]
    assert max(map(int, restarts)) >= 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_saves_at_its_time_limit_and_goes_on(cluster, launch, data_set, tmp_path):
    """The warning that SLURM sends before the limit is sent by hand."""
    spec = sweep_file(
        tmp_path, data_set, "points: [{expansion: [1], overrides: [checkpoint.every=500, log.every=1]}]\n"
    )
    spec.write_text(spec.read_text().replace("tokens: [384]", "tokens: [128000]"))
    ids = queued(launch("submit", "--sweep", spec, "--tasks", "1"))
    (log,) = cluster.until(lambda: list((tmp_path / "out").glob("w32*.log")), 120, "the run")
    cluster.until(lambda: re.search(r"step +1/1000 ", log.read_text()), 120, "its steps")
    cluster.run("scancel", "--batch", "--signal=USR1", f"{ids['sweep']}_0")
    assert over(cluster, ids["sweep"], 300) == ["COMPLETED"]
    assert "Restarts=1 " in cluster.run("scontrol", "-o", "show", "job", ids["sweep"])
    assert "stopped" in log.read_text()
    assert over(cluster, ids["collect"]) == ["COMPLETED"]
    assert (tmp_path / "out/runs.csv").read_text().count("w32-dense") == 1


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_sweep_is_trained_by_an_array_and_collected(cluster, launch, data_set, tmp_path):
    """The second run fails; the first one is collected all the same."""
    points = "points: [{expansion: [1]}, {variant: bad, overrides: [model.vocab_size=64]}]\n"
    spec = sweep_file(tmp_path, data_set, points)
    ids = queued(launch("submit", "--sweep", spec, "--tasks", "8"))  # no more than there are runs
    assert sorted(over(cluster, ids["sweep"])) == ["COMPLETED", "FAILED"]
    assert over(cluster, ids["collect"]) == ["COMPLETED"]
    assert (tmp_path / "out/runs.csv").read_text().count("w32-dense") == 1
    status = launch("status", tmp_path / "out").stdout
    assert "sweep task 1 FAILED: error: w32-e8-g8-shared-bad-384-seed0 failed" in status
