"""What is printed and refused before anything is queued, without SLURM; and with commands that stand for it, where a
real one cannot be made to fail. tests/launch/test_submit_slurm.py has a real one."""

import json
import os
import re
import shlex
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from launch import submit
from mm_train.watchdog import heartbeat_file
from tests.mm_train.test_recipe_state import first_done, recipe_files  # noqa: F401 - fixtures

ROOT = Path(__file__).parents[2]
S = "configs/recipe/s.yaml"
PRETRAIN = [S, "--dry-run", "--until", "pretrain"]
SITE = """
MM_PARTITION=gpu
MM_ACCOUNT=lab
MM_TIME=24:00:00
MM_CPUS_PER_GPU=12
MM_SIGNAL_SECONDS=600
MM_SBATCH_ARGS="--exclusive --comment='two words'"
MM_CPU_PARTITION=cpu
MM_CPU_CPUS=64
"""
PARTITIONS = """PartitionName=gpu Default=YES MaxNodes=UNLIMITED MaxTime=2-00:00:00 State=UP TotalNodes=16
PartitionName=cpu Default=NO MaxNodes=4 MaxTime=UNLIMITED State=UP TotalNodes=8"""


@pytest.fixture(autouse=True)
def here(monkeypatch, tmp_path):
    """In the project's folder, with no SLURM among the programs."""
    monkeypatch.chdir(ROOT)
    monkeypatch.delenv("MM_SITE", raising=False)
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in ("bash", "env", "cat", "sh"):
        (programs / name).symlink_to(shutil.which(name))
    monkeypatch.setenv("PATH", str(programs))
    return programs


@pytest.fixture
def site(tmp_path) -> Path:
    path = tmp_path / "site.env"
    path.write_text(SITE)
    return path


@pytest.fixture
def slurm(here, tmp_path):
    """A function: put a command into the place of one of SLURM's; calls are listed in tmp_path/calls."""

    def stand_in(name: str, text: str) -> None:
        (here / name).write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>{tmp_path}/calls\n{text}\n')
        (here / name).chmod(0o755)

    stand_in("scontrol", f'[ "$2" = partition ] && echo "{PARTITIONS}" || {{ echo "Invalid job id" >&2; exit 1; }}')
    stand_in("sacct", "exit 1")
    stand_in("sacctmgr", "echo lab; echo other")
    stand_in("scancel", "")
    stand_in("sbatch", f'[ "$1" = --test-only ] && exit 0; echo $(($(grep -c parsable {tmp_path}/calls) + 100))')
    (here / "grep").symlink_to(shutil.which("grep", path=os.defpath + ":/usr/bin"))
    return stand_in


def calls(tmp_path: Path, name: str) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith(name + " ")]


def test_a_dry_run_of_s_on_eight_nodes(site, capsys):
    words = [S, "--site", str(site), "--nodes", "8,sft=2", "--prepare", "--dry-run", "sft.optim.lr=2e-6"]
    assert submit.main(words) == 0
    out = capsys.readouterr().out
    (pretrain,) = (line.split() for line in out.splitlines() if line.startswith("pretrain "))
    assert pretrain[1:4] == ["8", "x", "8"]
    assert "EP 4, ZeRO 1, 8 rows x 4 " in out
    assert {"6T", "0/1430512", "7,682"} <= set(pretrain)  # GPU hours are those of describe
    assert "assumed, not measured: NVIDIA H100 SXM (80 GiB, 989 TFLOP/s) at 40% MFU" in out
    assert "pretrain: 5.0 times MM_TIME=24:00:00" in out
    assert "SLURM is not installed here" in out

    script = out[out.index("export MM_SITE") : out.index("note:")]
    assert subprocess.run(["bash", "-n"], input=script, text=True).returncode == 0
    commands = dict(line.split("=$(", 1) for line in script.splitlines() if "=$(" in line)
    assert list(commands) == [
        *("job_data_pretrain", "job_pretrain", "job_data_midtrain", "job_midtrain"),
        *("job_data_sft", "job_sft", "job_qat", "job_export"),
    ]
    pretrain = shlex.split(commands["job_pretrain"].removesuffix(")"))
    assert {"--partition=gpu", "--account=lab", "--time=24:00:00", "--nodes=8", "--ntasks-per-node=8"} <= set(pretrain)
    assert {"--gpus-per-node=8", "--cpus-per-task=12", "--signal=B:USR1@600", "--exclusive"} <= set(pretrain)
    assert {"--comment=two words", "--requeue", "--open-mode=append", "--kill-on-invalid-dep=yes"} <= set(pretrain)
    assert "--output=runs/s/pretrain/slurm/%j.log" in pretrain
    assert "--dependency=afterok:$job_data_pretrain" in pretrain
    assert pretrain[-5:] == [
        *("launch/slurm_pretrain.sh", "configs/model/s.yaml", "configs/stage/pretrain.yaml"),
        *("run.dir=runs/s/pretrain", "run.stage=pretrain"),
    ]
    sft = shlex.split(commands["job_sft"].removesuffix(")"))
    assert {"--nodes=2", "--dependency=afterok:$job_midtrain:$job_data_sft", "optim.lr=2e-6"} <= set(sft)
    data = shlex.split(commands["job_data_sft"].removesuffix(")"))
    assert {"--partition=cpu", "--cpus-per-task=64", "--array=0-15"} <= set(data)
    assert "--exclusive" not in data
    assert data[-4:] == ["launch/slurm_data_prep.sh", "configs/data/sft.yaml", "--world", "16"]
    assert "--dependency=afterok:$job_sft:$job_data_sft" in commands["job_qat"]
    assert commands["job_export"].endswith("slurm_export.sh --checkpoint runs/s/qat --out runs/s/export --format int4)")


def test_torchrun_has_one_task_a_node(site, capsys):
    site.write_text(SITE + "MM_LAUNCHER=torchrun\n")
    assert submit.main([*PRETRAIN, "--site", str(site)]) == 0
    out = capsys.readouterr().out
    assert "--ntasks-per-node=1 --gpus-per-node=8 --cpus-per-task=96" in out
    assert "job_midtrain" not in out
    assert "job_export" not in out


@pytest.mark.parametrize(
    ("words", "error"),
    [
        (["--nodes", "64"], "stage pretrain on 512 ranks: train.global_batch_tokens (4194304) must be a multiple of"),
        (["--nodes", "64"], "pretrain.train.micro_batch_size=4 would do"),
        (["parallel.expert_parallel=7"], "parallel.expert_parallel (7) must divide model.num_local_experts (60)"),
        (["--nodes", "8,sfft=2"], "no stage 'sfft' in recipe mobilemoe-s"),
        (["--nodes", "many"], "--nodes many: 'many' is no number of nodes"),
        (["--stage", "qat"], "runs/s/sft, which is not finished (not started"),
        (["--stage", "qat", "--until", "sft"], "--stage and --until exclude each other"),
        (["--tasks", "0"], "--tasks is 0"),
        (["--gpu", "h1000"], "--gpu: unknown h1000"),
        (["--sweep", "x", "--data", "y"], "--sweep and --data exclude each other"),
        (["--data", "y"], "s.yaml: a recipe is no part of --sweep and --data"),
    ],
)
def test_what_cannot_work_is_refused(words, error, capsys):
    assert submit.main([S, "--dry-run", *words]) == 2
    assert error in capsys.readouterr().err


def test_experts_that_the_ranks_do_not_divide(site, capsys):
    site.write_text("MM_GPUS_PER_NODE=2\n")
    assert submit.main([*PRETRAIN, "--site", str(site)]) == 2
    assert "stage pretrain on 2 ranks: parallel.expert_parallel (4) must divide" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("MM_CONTAINER_IMAGE=/images/none.sqsh", "MM_CONTAINER_IMAGE=/images/none.sqsh: there is no such file"),
        ("MM_PYTHON=/none/python", "MM_PYTHON=/none/python: there is no such program"),
        ("MM_SCRATCH=/proc", "MM_SCRATCH cannot be written: /proc"),
    ],
)
def test_files_of_the_site_that_are_not_there(site, line, error, capsys):
    site.write_text(line + "\n")
    assert submit.main([*PRETRAIN, "--site", str(site)]) == 2
    assert error in capsys.readouterr().err


def test_a_file_system_that_cannot_be_written(capsys):
    assert submit.main([*PRETRAIN, "--out", "/proc/runs"]) == 2
    assert "the run folder cannot be written: /proc (for /proc/runs)" in capsys.readouterr().err


def test_what_is_not_on_this_machine_is_a_note(site, capsys):
    site.write_text("MM_CONTAINER_IMAGE=docker://x/y\nMM_CONTAINER_MOUNTS=/none:/data\nMM_SCRATCH=/none/tmp\n")
    assert submit.main([*PRETRAIN, "--site", str(site), "--prepare"]) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note:")]
    assert [any(word in note for note in notes) for word in ("in a registry", "/none is not", "/none/tmp")] == [
        True
    ] * 3


def test_a_layout_that_leaves_the_node_or_does_not_fit_is_told(capsys):
    words = ["parallel.expert_parallel=20", "--nodes", "5", "train.global_batch_tokens=3276800", "--gpu", "a100-40"]
    assert submit.main([*PRETRAIN, *words]) == 0
    out = capsys.readouterr().out
    assert "pretrain: expert_parallel x tensor_parallel is 20, more than the 8 ranks of a node" in out
    assert submit.main([*PRETRAIN, "--gpu", "a100-40", "train.micro_batch_size=16"]) == 0
    assert "does not fit into NVIDIA A100 40GB (40 GiB); describe would take" in capsys.readouterr().out


def test_without_slurm_nothing_is_queued(capsys, recipe_files, tmp_path):  # noqa: F811
    assert submit.main([str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), *ONE]) == 2
    assert "sbatch is not installed here" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_data_that_is_not_there_stops_the_first_stage_only(slurm, recipe_files, tmp_path, capsys):  # noqa: F811
    words = [str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), *ONE]
    assert submit.main([*words, "first.data.path=/none"]) == 2
    assert "stage first: data set /none is not there" in capsys.readouterr().err
    assert submit.main([*words, "second.data.path=/none"]) == 0
    assert "note: stage second: data set /none is not there" in capsys.readouterr().out


ONE = ["train.micro_batch_size=1"]  # so that the small batch divides over eight ranks


def test_finished_stages_are_left_out_and_a_record_is_kept(slurm, recipe_files, first_done, tmp_path, capsys, site):  # noqa: F811
    shutil.copytree(first_done, tmp_path / "runs")
    words = [
        str(recipe_files / "recipe.yaml"),
        "--out",
        str(tmp_path / "runs"),
        "--site",
        str(site),
        "second.train.micro_batch_size=1",
    ]
    assert submit.main(words) == 0
    out = capsys.readouterr().out
    assert "queued: second 101, export 102" in out
    record = json.loads((tmp_path / "runs/chain.json").read_text())
    assert [(job["name"], job["job"], job["after"]) for job in record["jobs"]] == [
        ("second", "101", []),
        ("export", "102", ["second"]),
    ]
    assert record["overrides"] == ["second.train.micro_batch_size=1"]
    assert "--dependency=afterok:101" in record["jobs"][1]["command"]
    assert (tmp_path / "runs/second/slurm").is_dir()  # SLURM makes no folder for a log
    queued = [line for line in calls(tmp_path, "sbatch") if "--parsable" in line]
    assert [" ".join(job["command"]) for job in record["jobs"]] == queued

    running = 'echo "JobId=$3 JobState=RUNNING Reason=None"'
    slurm("scontrol", f'[ "$2" = partition ] && echo "{PARTITIONS}" || {running}')
    assert submit.main(words) == 2
    assert "is queued already: jobs 101 (second, RUNNING), 102 (export, RUNNING)" in capsys.readouterr().err


def test_when_a_later_job_is_refused_the_earlier_ones_are_cancelled(slurm, recipe_files, tmp_path, capsys):  # noqa: F811
    slurm(
        "sbatch",
        '[ "$1" = --test-only ] && exit 0\n'
        "error='sbatch: error: Batch job submission failed: Job violates policy'\n"
        'case "$*" in *slurm_export*) echo "$error" >&2; exit 1;; esac\n'
        "echo 7",
    )
    words = [str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), *ONE]
    assert submit.main(words) == 2
    err = capsys.readouterr().err
    assert "SLURM refused the job export: Job violates policy; cancelled again: first, second" in err
    assert calls(tmp_path, "scancel") == ["scancel 7 7"]
    assert not (tmp_path / "runs/chain.json").exists()
    slurm("scancel", "echo 'scancel: error: Kill job error on job id 7: Access denied' >&2; exit 1")
    assert submit.main(words) == 2
    assert "could not be cancelled (Kill job error on job id 7: Access denied): scancel 7 7" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("=gpu", "=gpuu", "MM_PARTITION=gpuu: this cluster has no such partition (did you mean gpu?)"),
        ("=cpu", "=big", "MM_CPU_PARTITION=big: this cluster has no such partition (there are cpu, gpu)"),
        ("=lab", "=lob", "MM_ACCOUNT=lob: not an account of yours (yours: lab, other)"),
        ("24:00:00", "3-00:00:00", "asks for 3-00:00:00; partition gpu gives 2-00:00:00 at most"),
        ("MM_CPUS_PER_GPU=12", "MM_NODES=17", "asks for 17 nodes; partition gpu gives 16 at most"),
    ],
)
def test_what_the_cluster_does_not_have(slurm, site, recipe_files, tmp_path, old, new, error, capsys):  # noqa: F811
    site.write_text(SITE.replace(old, new, 1))
    words = [str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), "--site", str(site)]
    batch = ["train.micro_batch_size=1", "train.global_batch_tokens=8704", "train.tokens=26112"]  # 136 ranks
    assert submit.main([*words, *batch]) == 2
    assert error in capsys.readouterr().err
    assert not any("--parsable" in line for line in calls(tmp_path, "sbatch") if (tmp_path / "calls").exists())
    assert not (tmp_path / "runs").exists()


def test_without_accounting_the_account_is_left_to_slurm(slurm, site, recipe_files, tmp_path, capsys):  # noqa: F811
    site.write_text("MM_ACCOUNT=lab\n")
    slurm("sacctmgr", "echo 'You are not running a supported accounting_storage plugin' >&2; exit 1")
    words = [str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), "--site", str(site), *ONE]
    assert submit.main([*words, "--dry-run"]) == 0
    assert "MM_ACCOUNT=lab could not be looked up" in capsys.readouterr().out


def test_what_slurm_would_refuse_is_asked_before(slurm, recipe_files, tmp_path, capsys):  # noqa: F811
    slurm("sbatch", "echo 'allocation failure: Invalid qos specification' >&2; exit 1")
    assert submit.main([str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), *ONE]) == 2
    assert "SLURM would refuse the job first: " in capsys.readouterr().err


def test_a_stage_that_is_trained_by_somebody_else(slurm, recipe_files, tmp_path, capsys):  # noqa: F811
    run = tmp_path / "runs/first"
    heartbeat_file(run, 0).parent.mkdir(parents=True)
    heartbeat_file(run, 0).write_text(json.dumps({"step": 1, "phase": "forward", "time": time.time(), "pid": 1}))
    (run / "metrics.jsonl").write_text('{"kind": "run", "stage": "first"}\n')
    assert submit.main([str(recipe_files / "recipe.yaml"), "--out", str(tmp_path / "runs"), *ONE]) == 2
    assert "stage first is being trained in" in capsys.readouterr().err


def test_arrays(site, capsys):
    words = ["--site", str(site), "--dry-run"]
    assert submit.main(["--sweep", "configs/sweep/ablation.yaml", "--tasks", "100", *words]) == 0
    out = capsys.readouterr().out
    # how many are left to train is up to runs/ablation, which whoever runs the tests may have
    assert re.search(r"\b39 runs \(\d+ to train\), 47,923,200 tokens, 39 tasks", out)
    assert "--array=0-38 --nodes=1 --ntasks=1 --gpus-per-node=1 --cpus-per-task=12 --signal=B:USR1@600" in out
    assert "--dependency=afterany:$job_sweep" in out
    assert "slurm_sweep.sh configs/sweep/ablation.yaml --collect)" in out
    assert submit.main(["--data", "configs/data/pretrain.yaml", "--tasks", "32", "tokenizer.kind=llama3", *words]) == 0
    out = capsys.readouterr().out
    assert "--array=0-31 --nodes=1 --ntasks=1 --cpus-per-task=64 launch/slurm_data_prep.sh" in out
    assert "configs/data/pretrain.yaml tokenizer.kind=llama3 --world 32)" in out
