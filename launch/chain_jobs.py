"""What is queued: the jobs of a chain or an array, each with its sbatch command. Torch-free."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launch.chain_cost import Shape
from launch.site_file import Site
from mm_train.recipe_plan import Export, Stage

SCRIPTS = Path("launch")
TRAIN, EXPORT, DATA, SWEEP, COLLECT = "train", "export", "data", "sweep", "collect"
STAGE_SCRIPTS = ("pretrain", "midtrain", "sft", "qat")


@dataclass(frozen=True)
class Job:
    """One sbatch command to be."""

    name: str  # of the step: a stage, "export", "data-sft"; unique in a chain
    kind: str  # of the names above
    script: Path
    words: tuple[str, ...]  # of the script
    flags: tuple[str, ...]  # of sbatch, without dependencies
    folder: Path  # run folder: its slurm/ gets the log
    after: tuple[str, ...] = ()  # jobs that must have ended well
    any_end: bool = False  # runs however those before it ended
    tasks: int = 0  # of an array; 0: none

    @property
    def logs(self) -> Path:
        return self.folder / "slurm"

    def command(self, ids: Mapping[str, str]) -> list[str]:
        """The command, given the job ids of those before it (or what stands for them in a shell)."""
        words = ["sbatch", "--parsable", *self.flags]
        if self.after:
            kind = "afterany" if self.any_end else "afterok"
            words.append(f"--dependency={kind}:{':'.join(ids[name] for name in self.after)}")
            words.append("--kill-on-invalid-dep=yes")
        return [*words, str(self.script), *self.words]


def training(recipe: str, stage: Stage, shape: Shape, site: Site, after: Sequence[str]) -> Job:
    """The job of a stage."""
    script = stage.config.run.stage if stage.config.run.stage in STAGE_SCRIPTS else STAGE_SCRIPTS[0]
    cores = site.number("MM_CPUS_PER_GPU", 0)
    processes = shape.per_node
    if site.text("MM_LAUNCHER") == "torchrun":  # one agent a node, which starts the ranks
        cores, processes = cores * processes, 1
    flags = [f"--nodes={shape.nodes}", f"--ntasks-per-node={processes}"]
    flags += [f"--gpus-per-node={shape.per_node}"] if shape.gpus else []
    flags += [f"--cpus-per-task={cores}"] if cores else []
    flags += [f"--signal=B:USR1@{site.text('MM_SIGNAL_SECONDS')}"] if site.text("MM_SIGNAL_SECONDS") else []
    common = _common(f"{recipe}-{stage.name}", stage.run_dir, site, "MM_PARTITION", "MM_TIME")
    place = SCRIPTS / f"slurm_{script}.sh"
    return Job(stage.name, TRAIN, place, tuple(stage.words), (*common, *flags), stage.run_dir, tuple(after))


def export(recipe: str, made: Export, site: Site, after: Sequence[str]) -> Job:
    """The job of the release. Its log is in the last stage's run folder: the release folder appears whole."""
    flags = (*_common(f"{recipe}-export", made.run_dir, site, *_light(site)), *_one_process(site))
    return Job("export", EXPORT, SCRIPTS / "slurm_export.sh", tuple(made.words), flags, made.run_dir, tuple(after))


def preparation(name: str, words: Sequence[str], out: Path, tasks: int, site: Site) -> Job:
    """The array that prepares a data set; `words` are those of data_prep.run."""
    common = _common(name, out, site, *_light(site), array=True)
    flags = (*common, f"--array=0-{tasks - 1}", *_one_process(site))
    # a task that is started again need not know the array any more, so the number of tasks is among the words
    words = (*words, "--world", str(tasks))
    return Job(name, DATA, SCRIPTS / "slurm_data_prep.sh", words, flags, out, tasks=tasks)


def sweep(spec: Path, out: Path, tasks: int, site: Site) -> list[Job]:
    """The array that trains a sweep's runs, a GPU for each task, and the job that collects them afterwards."""
    cores = site.number("MM_CPUS_PER_GPU", 0)
    flags = [f"--array=0-{tasks - 1}", "--nodes=1", "--ntasks=1"]
    flags += ["--gpus-per-node=1"] if site.gpus_per_node else []
    flags += [f"--cpus-per-task={cores}"] if cores else []
    flags += [f"--signal=B:USR1@{site.text('MM_SIGNAL_SECONDS')}"] if site.text("MM_SIGNAL_SECONDS") else []
    common = _common(f"sweep-{spec.stem}", out, site, "MM_PARTITION", "MM_TIME", array=True)
    script = SCRIPTS / "slurm_sweep.sh"
    collect = (*_common(f"collect-{spec.stem}", out, site, *_light(site)), *_one_process(site))
    return [
        Job("sweep", SWEEP, script, (str(spec), "--world", str(tasks)), (*common, *flags), out, tasks=tasks),
        Job("collect", COLLECT, script, (str(spec), "--collect"), collect, out, ("sweep",), any_end=True),
    ]


def shell_script(jobs: Sequence[Job], site: Site) -> str:
    """The commands as a shell takes them: each job's id is a variable that the next one's dependency names."""
    lines = [f"export MM_SITE={shlex.quote(str(site.path))}"] if site.path else []
    folders = dict.fromkeys(str(job.logs) for job in jobs)
    lines += [f"mkdir -p {shlex.join(folders)}"] if folders else []
    variables = {job.name: f"${_variable(job.name)}" for job in jobs}
    for job in jobs:
        words = job.command(variables)
        text = " ".join(word if word.startswith("--dependency=") else shlex.quote(word) for word in words)
        lines.append(f"{_variable(job.name)}=$({text})")
    return "\n".join(lines)


def _variable(name: str) -> str:
    return "job_" + "".join(letter if letter.isalnum() else "_" for letter in name)


def _light(site: Site) -> tuple[str, str]:
    """Keys of the partition and the time limit for jobs without a GPU."""
    partition = "MM_CPU_PARTITION" if site.text("MM_CPU_PARTITION") else "MM_PARTITION"
    return partition, "MM_CPU_TIME" if site.text("MM_CPU_TIME") else "MM_TIME"


def _one_process(site: Site) -> tuple[str, ...]:
    cores = site.number("MM_CPU_CPUS", 0)
    return ("--nodes=1", "--ntasks=1", *([f"--cpus-per-task={cores}"] if cores else []))


def _common(name: str, folder: Path, site: Site, partition: str, time: str, array: bool = False) -> tuple[str, ...]:
    """Flags of every job."""
    log = folder / "slurm" / ("%A_%a.log" if array else "%j.log")
    keys = {partition: "--partition", "MM_ACCOUNT": "--account", "MM_QOS": "--qos", time: "--time"}
    of_site = [f"{flag}={site.text(key)}" for key, flag in keys.items() if site.text(key)]
    more = shlex.split(site.text("MM_SBATCH_ARGS")) if partition == "MM_PARTITION" else []  # they may ask for GPUs
    return (f"--job-name={name}", *of_site, "--requeue", "--open-mode=append", f"--output={log}", *more)
