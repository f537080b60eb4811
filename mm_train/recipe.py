"""Run the stages of a recipe on this machine, one after the other, or say how far they are; again resumes.

python -m mm_train.recipe configs/recipe/tiny.yaml --prepare
python -m mm_train.recipe configs/recipe/tiny.yaml --processes 2 parallel.expert_parallel=2 sft.optim.lr=1e-4
python -m mm_train.recipe configs/recipe/tiny.yaml --status
"""

import argparse
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from mm_train import recipe_plan, recipe_state
from mm_train.cli import UserError, command
from mm_train.processes import beside, environment_alone, training_command
from mm_train.recipe_plan import Recipe, Stage
from mm_train.recipe_state import DONE, State
from mm_train.report import align
from mm_train.stopping import STOPPED

PASSED_ON = {signal.SIGTERM: signal.SIGTERM, signal.SIGUSR1: signal.SIGUSR1, signal.SIGHUP: signal.SIGTERM}
EPILOG = f"""A recipe file (mm_train/recipe_plan.py) names model file, stage files and data configurations. Every stage
gets a run folder OUT/STAGE and starts from the one before it, which has to be finished; the last one is exported.

key=value overrides every stage, STAGE.key=value one of them. SIGTERM and SIGUSR1 are passed on: the stage under way
writes a checkpoint, and the command leaves with status {STOPPED}. Otherwise the status is that of the step that failed.
"""


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.recipe",
        description="Train the stages of a recipe in their order. The same command again goes on where it stopped.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for every stage; STAGE.key=value for one")
    parser.add_argument("--out", help="folder of the run folders (default: the recipe's)")
    parser.add_argument("--processes", type=int, default=1, metavar="N", help="ranks of a stage (default %(default)s)")
    parser.add_argument("--stage", metavar="NAME", help="this one alone; the one before it has to be finished")
    parser.add_argument("--until", metavar="NAME", help="the stages up to this one, and no export")
    parser.add_argument("--prepare", action="store_true", help="prepare data sets that are not there: data_prep.run")
    parser.add_argument("--keep", action="store_true", help="take stages as they are that were trained otherwise")
    parser.add_argument("--status", action="store_true", help="say how far it is, and do nothing")
    parser.add_argument("--dry-run", action="store_true", help="also print the commands that would be run")
    args = parser.parse_intermixed_args(argv)
    if args.processes < 1:
        raise UserError(f"--processes is {args.processes}; it must be at least 1")
    if args.stage and args.until:
        raise UserError("--stage and --until exclude each other: one stage alone, or all up to one")
    recipe = recipe_plan.load(args.recipe, args.out, args.overrides)
    asked = asked_for(recipe, args.stage, args.until)
    steps = steps_of(recipe, asked, args.processes, args.prepare)
    if args.status or args.dry_run:
        print(overview(recipe, steps))
        if args.dry_run:
            print("\n".join(["", *(shlex.join(["python", *words[1:]]) for _, words in steps)]))
        return 0
    check(recipe, asked, args.keep, args.prepare)
    with Relay() as relay:
        for headline, words in steps:
            print(f"\n--- {headline}", flush=True)
            status = relay.run(words)
            if status:
                print(f"\n{recipe.name} stopped at: {headline}; the same command goes on from there", file=sys.stderr)
                return status
    print(f"\n{overview(recipe, steps_of(recipe, recipe.stages, args.processes, prepare=False))}")
    return 0


Step = tuple[str, list[str]]  # headline, command


def asked_for(recipe: Recipe, only: str | None, until: str | None) -> tuple[Stage, ...]:
    """The stages that --stage and --until leave, in order. Raises UserError for a name that is none."""
    if only:
        return (recipe.stage(only),)
    return recipe.stages[: recipe.stages.index(recipe.stage(until)) + 1] if until else recipe.stages


def steps_of(recipe: Recipe, asked: Sequence[Stage], processes: int, prepare: bool) -> list[Step]:
    """What is still to be done of some stages, in order: data sets (`prepare`), training, export once all are asked."""
    states = recipe_state.states(recipe)
    left = [state.stage for state in states if state.stage in asked and state.kind != DONE]
    steps: list[Step] = []
    for stage in left if prepare else ():
        words = preparation(stage)
        if words and all(words != known for _, known in steps):  # stages may share a data set
            steps.append((f"data for {stage.name}", words))
    steps += [(f"training: {stage.name}", training_command(stage.words, processes)) for stage in left]
    if recipe.export and len(asked) == len(states) and (left or not recipe_state.is_exported(recipe.export)):
        steps.append(("export", [sys.executable, "-m", "mm_train.export", *recipe.export.words]))
    return steps


def preparation(stage: Stage) -> list[str] | None:
    """The command that prepares the data set of a stage; None when it is there, or nobody says how.

    Raises UserError when its data configuration prepares another folder than the stage reads.
    """
    if stage.data_config is None:
        return None
    folder, read = recipe_plan.prepared_folder(stage.data_config), stage.config.data.path
    if Path(folder) != Path(read):
        raise UserError(f"stage {stage.name} reads data.path={read}, but {stage.data_config} prepares {folder}")
    if (Path(folder) / "dataset.json").is_file():
        return None
    return [sys.executable, "-m", "data_prep.run", str(stage.data_config)]


def check(recipe: Recipe, asked: Sequence[Stage], keep: bool, prepare: bool) -> None:
    """Raise UserError when stages cannot be gone on from, or the next one has no data and it will not be prepared."""
    if why := recipe_state.refusal(recipe, asked[0]):
        raise UserError(why)
    found = recipe_state.states(recipe)
    last = recipe.stages.index(asked[-1])
    for state in found[: last + 1]:
        if state.trouble and not keep:
            raise UserError(
                f"{state.trouble}; remove {state.stage.run_dir} and what came after it, or go on with --keep"
            )
    following = next((state for state in found if state.stage in asked and state.kind != DONE), None)
    if following and not prepare and (text := _missing(following)):
        raise UserError(f"stage {following.stage.name}: {text}")


def overview(recipe: Recipe, steps: list[Step]) -> str:
    """Where the recipe stands, as a table, and what comes next."""
    found = recipe_state.states(recipe)
    lines = [align(recipe_state.rows(recipe, found))]
    lines += [f"note: {state.trouble}" for state in found if state.trouble]
    lines += [f"note: {text}" for text in dict.fromkeys(_missing(state) for state in found) if text]
    lines.append(f"next: {steps[0][0]}" if steps else "nothing is left to do")
    return "\n".join(lines)


def _missing(state: State) -> str | None:
    """That a stage to be trained has no data, and what to do; None when it has."""
    if state.kind == DONE or not (words := preparation(state.stage)):
        return None
    folder = state.stage.config.data.path
    return f"data set {folder} is not prepared: {shlex.join(['python', *words[1:]])}, or --prepare"


class Relay:
    """Runs one command after the other, and passes on signals that ask to stop."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._asked = False
        taken = [n for n in PASSED_ON if signal.getsignal(n) != signal.SIG_IGN]  # as SIGHUP is under nohup
        self._before = {n: signal.signal(n, self._pass_on) for n in taken}

    def run(self, words: list[str]) -> int:
        """The exit status of the command (128 + N for signal N); STOPPED without starting it once asked to stop."""
        if self._asked:
            return STOPPED
        self._process = subprocess.Popen(beside(words), env=environment_alone())
        if self._asked:  # in between
            self._process.send_signal(signal.SIGTERM)
        while True:
            try:
                status = self._process.wait()
                return status if status >= 0 else 128 - status
            except KeyboardInterrupt:  # the terminal sends it to the child as well, which ends by itself
                self._process.wait()
                raise

    def __enter__(self) -> "Relay":
        return self

    def __exit__(self, *_: object) -> None:
        for n, handler in self._before.items():
            signal.signal(n, handler)

    def _pass_on(self, n: int, _: FrameType | None) -> None:
        self._asked = True
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(PASSED_ON[signal.Signals(n)])


if __name__ == "__main__":
    sys.exit(main())
