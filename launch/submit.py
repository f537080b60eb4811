"""Queue a recipe on a SLURM cluster: a job for each stage that is left, each waiting for the one before; again resumes.

python -m launch.submit configs/recipe/s.yaml --site launch/site.env --nodes 8 --prepare --dry-run
python -m launch.submit configs/recipe/s.yaml --site launch/site.env --nodes 8,sft=2,qat=1 sft.optim.lr=2e-6
python -m launch.submit --sweep configs/sweep/ablation.yaml --tasks 8
python -m launch.submit --data configs/data/pretrain.yaml --tasks 32

What it will run and cost is printed first. What would fail later (partition, account, container, file system, layout,
data) is refused in one line before anything is queued, and when SLURM refuses a job those queued before it are
cancelled. --dry-run needs no SLURM. python -m launch.status says how far it is.
"""

import argparse
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from launch import chain_checks, chain_cost, chain_jobs, chain_queue, site_file
from launch.chain_cost import Estimate, Shape
from launch.chain_jobs import Job
from launch.site_file import Site
from mm_train import recipe as recipe_command
from mm_train import recipe_plan, recipe_state
from mm_train.cli import UserError, command
from mm_train.files import is_folder
from mm_train.recipe_plan import Recipe
from mm_train.recipe_state import DONE, RUNNING
from mm_train.scaling_law import spec

DATA_TASKS = 16


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m launch.submit", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("recipe", nargs="?", metavar="RECIPE.yaml", help="recipe file (not with --sweep and --data)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every stage; STAGE.key=value for one")
    parser.add_argument("--site", type=Path, help=f"site file (default: $MM_SITE, else {site_file.DEFAULT})")
    parser.add_argument(
        "--nodes", default="", metavar="N[,STAGE=N...]", help="nodes of a stage (default: MM_NODES, or 1)"
    )
    parser.add_argument("--out", help="folder of the run folders, or of the data set (default: the file's)")
    parser.add_argument("--stage", metavar="NAME", help="this one alone; the one before it has to be finished")
    parser.add_argument("--until", metavar="NAME", help="the stages up to this one, and no export")
    parser.add_argument("--prepare", action="store_true", help="prepare data sets that are not there, before")
    parser.add_argument("--keep", action="store_true", help="take stages as they are that were trained otherwise")
    parser.add_argument("--sweep", type=Path, metavar="FILE", help="train the runs of a sweep file in an array job")
    parser.add_argument("--data", type=Path, metavar="FILE", help="prepare a data set in an array job")
    parser.add_argument("--tasks", type=int, default=DATA_TASKS, help="tasks of an array (default %(default)s)")
    parser.add_argument("--gpu", default="h100", help="GPU that is assumed for the estimates (default %(default)s)")
    parser.add_argument("--mfu", default=chain_cost.DEFAULT_MFU, help="and its utilisation (default %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print what would be queued, and queue nothing")
    args = parser.parse_intermixed_args(argv)
    if args.tasks < 1:
        raise UserError(f"--tasks is {args.tasks}; it must be at least 1")
    if sum(map(bool, (args.sweep, args.data))) > 1:
        raise UserError("--sweep and --data exclude each other: one array at a time")
    if args.sweep or args.data:
        if args.recipe and "=" not in args.recipe:
            raise UserError(f"{args.recipe}: a recipe is no part of --sweep and --data")
        args.overrides = [*filter(None, [args.recipe]), *args.overrides]  # the first word is an override then
        return sweep(args) if args.sweep else data(args)
    if not args.recipe:
        raise UserError("name a recipe file, as configs/recipe/s.yaml (or --sweep FILE, --data FILE)")
    return chain(args)


def chain(args: argparse.Namespace) -> int:
    """The stages of a recipe, and its release."""
    if args.stage and args.until:
        raise UserError("--stage and --until exclude each other: one stage alone, or all up to one")
    here = site_file.read(args.site)
    recipe = recipe_plan.load(Path(args.recipe), args.out, args.overrides)
    asked = recipe_command.asked_for(recipe, args.stage, args.until)
    recipe_command.check(recipe, asked, args.keep, prepare=True)
    shapes = shapes_of(recipe, here, args.nodes)
    found = [state for state in recipe_state.states(recipe) if state.stage in asked]
    estimates = chain_cost.estimate(found, shapes, args.gpu, args.mfu)
    todo = jobs_of(recipe, estimates, here, args.prepare, args.tasks)
    print(f"{recipe.name}: {args.recipe}, run folders in {recipe.out}, {site_said(here)}\n")
    print(chain_cost.table(recipe, estimates))
    print(chain_cost.assumptions(estimates))
    notes = [] if here.text("MM_GPUS_PER_NODE") else ["MM_GPUS_PER_NODE is not set: 8 GPUs a node are assumed"]
    notes += [note for it in estimates for note in it.notes(it.shape.per_node)]
    notes += [*_limits(estimates, here), *_data_notes(estimates, args.prepare, must=not args.dry_run)]
    facts = {
        "recipe": args.recipe,
        "overrides": list(args.overrides),
        "estimates": {it.state.stage.name: {"hours": it.hours, "gpu_hours": it.gpu_hours} for it in estimates},
    }
    for state in found:
        if state.kind == RUNNING and not chain_checks.recorded(recipe.out) and not args.dry_run:
            raise UserError(
                f"stage {state.stage.name} is being trained in {state.stage.run_dir} (a sign of life less than"
                f" {recipe_state.SILENT_SECONDS:.0f} s ago): wait for it, or stop it"
            )
    return chain_queue.queue(recipe.out, todo, here, facts, notes, args.dry_run)


def shapes_of(recipe: Recipe, here: Site, nodes: str) -> dict[str, Shape]:
    """Where each stage runs: --nodes, else the site's MM_NODES, else one node. Raises UserError."""
    wanted = {stage.name: here.number("MM_NODES", 1) for stage in recipe.stages}
    for word in filter(None, nodes.split(",")):
        name, equals, value = word.rpartition("=")
        if not (value.isascii() and value.isdecimal() and int(value) >= 1):
            raise UserError(f"--nodes {nodes}: {value!r} is no number of nodes, as in 8 or 8,sft=2")
        names = [recipe.stage(name).name] if equals else list(wanted)
        wanted |= dict.fromkeys(names, int(value))
    return {name: Shape(count, here.processes_per_node, here.gpus_per_node > 0) for name, count in wanted.items()}


def jobs_of(recipe: Recipe, estimates: Sequence[Estimate], here: Site, prepare: bool, tasks: int) -> list[Job]:
    """What is left of the asked stages, in order: data sets (`prepare`), training, the release once all are asked."""
    found: list[Job] = []
    made: dict[Path, str] = {}  # data configuration -> its job
    before: list[str] = []
    for it in estimates:
        stage = it.state.stage
        if it.state.kind == DONE:
            continue
        after = list(before)
        if prepare and stage.data_config and recipe_command.preparation(stage):
            if stage.data_config not in made:
                words = (str(stage.data_config),)
                job = chain_jobs.preparation(f"data-{stage.name}", words, Path(stage.config.data.path), tasks, here)
                found.append(job)
                made[stage.data_config] = job.name
            after.append(made[stage.data_config])
        found.append(chain_jobs.training(recipe.name, stage, it.shape, here, after))
        before = [stage.name]
    all_asked = len(estimates) == len(recipe.stages)
    if recipe.export and all_asked and (before or not recipe_state.is_exported(recipe.export)):
        found.append(chain_jobs.export(recipe.name, recipe.export, here, before))
    return found


def _limits(estimates: Sequence[Estimate], here: Site) -> Iterator[str]:
    """How often the time limit will end a stage, which then goes on by itself."""
    for it in estimates:
        if here.hours and it.hours and it.hours > here.hours:
            times = f"{it.hours / here.hours:.1f} times MM_TIME={here.text('MM_TIME')}"
            yield f"{it.state.stage.name}: {times}: it is saved and requeued at every limit"


def _data_notes(estimates: Sequence[Estimate], prepare: bool, must: bool) -> Iterator[str]:
    """Data sets that are not there: an error for the next stage, if it `must` start, a note for later ones."""
    for place, it in enumerate(it for it in estimates if it.state.kind != DONE):
        stage = it.state.stage
        path, how = stage.config.data.path, ""
        if recipe_command.preparation(stage):
            if prepare:
                continue
            words = ["python", "-m", "launch.submit", "--data", str(stage.data_config)]
            how = f": --prepare, or first {shlex.join(words)}"
        elif "://" in path or is_folder(Path(path)):
            continue
        text = f"stage {stage.name}: data set {path} is not there{how}"
        if must and not place:
            raise UserError(text)
        yield text


def sweep(args: argparse.Namespace) -> int:
    """The runs of a sweep file, and the job that collects them."""
    here = site_file.read(args.site)
    described = spec.load(args.sweep)
    everything, out = spec.runs(described), Path(described.out)
    if args.overrides:
        raise UserError(f"{args.overrides[0]}: a sweep takes no overrides here; write them into {args.sweep}")
    tasks = min(args.tasks, len(everything))
    left = sum(not (out / run.name / "DONE").is_file() for run in everything)
    tokens = sum(run.facts["tokens"] for run in everything)
    print(f"{args.sweep}: {len(everything)} runs ({left} to train), {tokens:,} tokens, {tasks} tasks, in {out}")
    return chain_queue.queue(
        out, chain_jobs.sweep(args.sweep, out, tasks, here), here, {"sweep": str(args.sweep)}, [], args.dry_run
    )


def data(args: argparse.Namespace) -> int:
    """A data set."""
    here = site_file.read(args.site)
    out = args.out or recipe_plan.prepared_folder(args.data)
    if not out:
        raise UserError(f"{args.data} has no `out`: say with --out where the data set goes")
    words = [str(args.data), *args.overrides, *(["--out", args.out] if args.out else [])]
    print(f"{args.data}: {args.tasks} tasks, data set in {out}")
    job = chain_jobs.preparation(f"data-{args.data.stem}", words, Path(out), args.tasks, here)
    return chain_queue.queue(Path(out), [job], here, {"data": str(args.data)}, [], args.dry_run)


def site_said(here: Site) -> str:
    return f"site file {here.path}" if here.path else "no site file: the cluster's defaults"


if __name__ == "__main__":
    sys.exit(main())
