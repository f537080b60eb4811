"""The batch script of a training job under SLURM, as slurm_body.sh turns into it.

    python -m launch.slurm_run STAGE FILE.yaml ... key=value ...

Resolves the configuration, copies the code to RUN/slurm, and becomes the same program in the copy, which goes through
one start of the job (launch/slurm_start.py). The job's comment in SLURM says where the copy is: a job that is requeued
begins there, and edits in the meantime change nothing.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from launch import slurm_site, snapshot
from launch.slurm_job import Job
from launch.slurm_start import JobStart
from mm_train.cli import command

COPY = "MM_JOB_COPY"  # JSON in the environment: what the process before the copy has found out


@command
def main(argv: Sequence[str] | None = None) -> int:
    stage, *words = sys.argv[1:] if argv is None else argv
    job = Job.read(os.environ)
    root = Path(os.environ.get("MM_ROOT") or Path.cwd())
    if COPY not in os.environ:
        go_on_from_copy(job, root, stage, words)
    facts = json.loads(os.environ.pop(COPY))
    run_dir = Path(facts["run_dir"])
    return JobStart(job, slurm_site.read(os.environ, root, run_dir), run_dir).run()


def go_on_from_copy(job: Job, root: Path, stage: str, words: list[str]) -> None:
    """Resolve the configuration, copy the code, and become the same program in the copy. Raises UserError."""
    site = slurm_site.read(os.environ, root)
    here = Path(__file__).resolve().parents[1]
    if here.name == copy_of(job):  # started again: slurm_body.sh has found it
        words = [str(here.parent / job.config)]
    if not any(word.endswith((".yaml", ".yml")) and "=" not in word for word in words):
        words = ["configs/model/s.yaml", f"configs/stage/{stage}.yaml", *words]
    world = len(job.nodes) * site.tasks
    ask = [site.python, "-m", "launch.resolved", str(world), job.config, *words]
    if site.container:
        ask = [*site.srun(1, 1), *ask]
    done = subprocess.run(ask, stdout=subprocess.PIPE, text=True)  # what is wrong, it says on stderr
    if done.returncode:
        sys.exit(done.returncode)
    facts = done.stdout.strip().splitlines()[-1]
    slurm = Path(json.loads(facts)["run_dir"]) / "slurm"
    code = snapshot.take(root, slurm / copy_of(job))
    job.comment(str(code))
    print(f"job {job.id}: what follows is in {slurm / job.log}", flush=True)
    log = os.open(slurm / job.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for descriptor in (1, 2):
        os.dup2(log, descriptor)
    paths = [str(code), *filter(None, [os.environ.get("PYTHONPATH")])]
    new = {COPY: facts, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}
    os.execve(sys.executable, [sys.executable, "-m", "launch.slurm_run", stage], os.environ | new)


def copy_of(job: Job) -> str:
    """Name in RUN/slurm of the code that the job runs in all its starts."""
    return f"code-{job.id}"


if __name__ == "__main__":
    sys.exit(main())
