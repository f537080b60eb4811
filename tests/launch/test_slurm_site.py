"""Settings of a site: read, checked, all of them explained; what is missing is one line before anything starts."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import slurm_job, slurm_site
from mm_train.cli import UserError

ROOT = Path(__file__).parents[2]
OURS = {"MM_SITE", "MM_ROOT", "MM_JOB_COPY", "MM_KERNELS"}  # not of a site: set by our own programs, or by the user


def read(**values: str) -> slurm_site.Site:
    return slurm_site.read({"MM_PYTHON": sys.executable} | values, ROOT, Path("/runs/try"))


def test_nothing_is_required():
    site = read()
    assert (site.launcher, site.tasks, site.gpus, site.container, site.preflight) == ("srun", 1, 0, (), True)
    assert site.srun(2, site.tasks, "--wait=0") == [
        "srun",
        "--nodes=2",
        "--ntasks=2",
        "--ntasks-per-node=1",
        "--export=ALL",
        "--wait=0",
    ]


def test_a_process_for_each_gpu():
    assert read(MM_GPUS_PER_NODE="8").tasks == read(SLURM_GPUS_ON_NODE="8").tasks == 8
    assert read(MM_GPUS_PER_NODE="0", SLURM_GPUS_ON_NODE="8", MM_TASKS_PER_NODE="2").tasks == 2
    assert read(SLURM_NTASKS_PER_NODE="4").tasks == 4
    command = read(MM_GPUS_PER_NODE="8", MM_CPUS_PER_GPU="12").srun(4, 8)
    assert {"--ntasks=32", "--ntasks-per-node=8", "--cpus-per-task=12"} < set(command)


def test_a_container_sees_the_project_and_the_run(tmp_path):
    image = tmp_path / "image.sqsh"
    image.touch()
    site = read(MM_CONTAINER_IMAGE=str(image), MM_CONTAINER_MOUNTS="/data:/data", MM_PYTHON="/only/inside/python")
    assert f"--container-mounts={ROOT}:{ROOT},/runs/try:/runs/try,/data:/data" in site.srun(1, 1)
    assert f"--container-image={image}" in site.srun(1, 1)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"MM_LAUNCHER": "mpirun"}, "MM_LAUNCHER is 'mpirun'; it must be srun or torchrun"),
        ({"MM_GPUS_PER_NODE": "eight"}, "MM_GPUS_PER_NODE is 'eight'; it must be a whole number of at least 0"),
        ({"MM_MAX_NO_PROGRESS": "0"}, "MM_MAX_NO_PROGRESS is '0'; it must be a whole number of at least 1"),
        ({"MM_PYTHON": "/no/python"}, "no Python at /no/python (MM_PYTHON)"),
        ({"MM_CONTAINER_IMAGE": "/no/image.sqsh"}, "no container image at /no/image.sqsh (MM_CONTAINER_IMAGE)"),
    ],
)
def test_what_cannot_be_right_is_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        read(**values)


def test_every_setting_is_explained_and_the_example_is_bash():
    example = ROOT / "launch/site.example.env"
    explained = set(re.findall(r"^#(MM_\w+)=", example.read_text(), re.MULTILINE))
    sources = [path.read_text() for path in (ROOT / "launch").iterdir() if path.suffix in (".py", ".sh")]
    used = {name for text in sources for name in re.findall(r"\bMM_[A-Z_]+[A-Z]\b", text)} - OURS
    assert used - explained == set()
    filled = re.sub(r"^#(\w+=)", r"\1", example.read_text(), flags=re.MULTILINE)
    assert subprocess.run(["bash", "-n"], input=filled, text=True).returncode == 0
    assert subprocess.run(["bash", "-euc", filled], env={"USER": "me"}).returncode == 0


def body(tmp_path: Path, **variables: str) -> subprocess.CompletedProcess:
    """The batch script outside of SLURM."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path), "MM_ROOT": str(ROOT)} | variables
    script = ROOT / "launch/slurm_pretrain.sh"
    return subprocess.run([script], env=environment, cwd=tmp_path, capture_output=True, text=True)


def test_what_the_batch_script_misses_is_one_line(tmp_path):
    done = body(tmp_path, MM_PYTHON=sys.executable)
    assert done.returncode == 2
    assert done.stderr.startswith("error: this runs inside a SLURM job: sbatch launch/slurm_pretrain.sh")
    cases = {"MM_SITE": "/no/site.env", "MM_ROOT": "/no/project", "MM_PYTHON": "/no/python", "MM_MODULES": "cuda/99"}
    for name, value in cases.items():
        done = body(tmp_path, **{name: value})
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")
        assert done.stderr.count("\n") == 1
        assert value in done.stderr or "no module command" in done.stderr


def test_a_site_file_is_handed_on(tmp_path):
    """Its variables are those of the process that follows: here one that prints them."""
    python = tmp_path / "python"
    python.write_text('#!/bin/bash\necho "$@" "$NCCL_DEBUG" "$MM_SCRATCH"\n')
    python.chmod(0o755)
    (tmp_path / "site.env").write_text(f"MM_PYTHON={python}\nNCCL_DEBUG=INFO\nMM_SCRATCH='/x/$SLURMD_NODENAME'\n")
    done = body(tmp_path, MM_SITE=str(tmp_path / "site.env"))
    assert done.stdout == "-m launch.slurm_run pretrain INFO /x/$SLURMD_NODENAME\n", done.stderr


def test_an_address_that_does_not_resolve_is_refused(monkeypatch):
    job = slurm_job.Job("12", 0, ("n1", "n2"), "gpu")
    answer = "NodeName=n1 NodeAddr=127.0.0.1 Port=1\nNodeName=n2 Arch=x NodeAddr=no-such-host.invalid Port=1\n"
    monkeypatch.setattr(slurm_job, "scontrol", lambda *_: answer)
    assert job.addresses(["n1"]) == {"n1": "127.0.0.1"}
    with pytest.raises(UserError, match=r"node n2 has the address 'no-such-host.invalid' .* the ranks could not meet"):
        job.addresses(["n1", "n2"])


def test_ports_differ_between_jobs_and_starts():
    ports = {slurm_job.Job(str(job), start, (), "").port for job in (812, 813, 814) for start in range(20)}
    assert len(ports) == 60
    assert all(10000 <= port < 32000 and port % 2 == 0 for port in ports)
