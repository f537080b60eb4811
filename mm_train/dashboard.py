"""The dashboard of a run: which panels, made of what, once for all. Torch-free.

The HTML report (mm_train.report) draws these panels from metrics.jsonl. This command makes a workspace of Weights &
Biases with the same ones:

python -m mm_train.dashboard --project mobilemoe-train
"""

import argparse
import re
import sys
from dataclasses import dataclass
from typing import Any

from mm_train.cli import UserError, command, first_line
from mm_train.config import Log
from mm_train.metric_names import PHASES
from mm_train.metrics import wandb_entity

EXAMPLES = """examples:
  python -m mm_train.dashboard --project mobilemoe-train
  python -m mm_train.dashboard --project mobilemoe-train --entity my-team --name "mixture of experts"
  python -m mm_train.dashboard --dry-run
"""


@dataclass(frozen=True)
class Panel:
    """One chart over the steps."""

    title: str
    metrics: tuple[str, ...]  # names of metric_names; "*" stands for any part, and one line is drawn for each
    note: str  # what it tells, in a sentence
    unit: str = ""
    percent: bool = False  # the values are shares
    logarithmic: bool = False
    stacked: bool = False  # the values are parts of a whole
    from_zero: bool = True  # the axis begins at 0 (in the report); not where small changes tell something


@dataclass(frozen=True)
class Section:
    """Panels that answer one question."""

    name: str
    note: str
    panels: tuple[Panel, ...]


def one_of_each_layer(title: str, metric: str, note: str) -> Panel:
    """A chart of the experts' load."""
    return Panel(title, (f"experts/{metric}/layer_*",), f"Over the mean of its layer, one line a layer; {note}")


SECTIONS = (
    Section(
        "Loss",
        "Is it learning?",
        (
            Panel("Loss", ("train/loss", "validation/*/loss"), "Training and held-out text.", "nats per token"),
            Panel("Held-out bits per byte", ("validation/*/bits_per_byte",), "Of each source.", "bits per byte"),
            Panel(
                "Benchmarks", ("evaluation/*",), "Scores of checkpoints, taken while training went on.", from_zero=False
            ),
            Panel(
                "Bits per byte of right answers",
                ("evaluation_bits/*",),
                "Of the same benchmarks, where answers are chosen: falls long before scores leave chance.",
                "bits per byte",
                from_zero=False,
            ),
        ),
    ),
    Section(
        "Optimisation",
        "Are the updates sane?",
        (
            Panel("Gradient norm", ("grad_norm/*",), "Before clipping: in all, and of each part of the network."),
            Panel("Learning rate", ("train/lr",), "On a logarithmic scale.", logarithmic=True),
            Panel("Faults", ("faults/*",), "Skipped steps, rollbacks and alerts so far."),
        ),
    ),
    Section(
        "Speed",
        "Does it use the machine? Speeds leave out the time of validation and checkpoints.",
        (
            Panel("Tokens a second", ("throughput/tokens_per_second",), "Over all processes."),
            Panel(
                "Tokens a second per GPU", ("throughput/tokens_per_second_per_gpu",), "Over the number of processes."
            ),
            Panel(
                "Model FLOPs utilisation (MFU)",
                ("throughput/mfu",),
                "Tokens a second x FLOPs per token / (GPUs x bf16 peak).",
                percent=True,
            ),
            Panel(
                "Model FLOP/s",
                ("throughput/model_flops_per_second",),
                "Tokens a second x FLOPs per token (6 for each active weight, and causal attention).",
            ),
            Panel(
                "Where a step's time goes",
                tuple(f"time/{phase}" for phase in (*PHASES, "other")),
                "Of the main process; checkpoint is the time that training stood still for it.",
                "seconds a step",
                stacked=True,
            ),
            Panel("Time of a step", ("time/step",), "Everything included.", "seconds"),
        ),
    ),
    Section(
        "Router",
        "Do tokens choose, and is the choice kept?",
        (
            Panel(
                "Router entropy",
                ("router/entropy/layer_*",),
                "One line a layer; log(experts) when all are equal, 0 when one has everything.",
                "nats per token",
                from_zero=False,
            ),
            Panel(
                "Router entropy, share of log(experts)",
                ("router/entropy_share",),
                "Mean over the layers.",
                percent=True,
                from_zero=False,
            ),
            Panel("z-loss", ("router/z_loss",), "Squared log-sum-exp of the router's logits, summed over layers."),
            Panel(
                "Dropped assignments",
                ("router/dropped_fraction",),
                "Share of token-to-expert assignments over capacity.",
                percent=True,
            ),
        ),
    ),
    Section(
        "Experts",
        "Do all of them work?",
        (
            one_of_each_layer("Busiest expert", "load_max", "1 is perfect balance."),
            one_of_each_layer("Idlest expert", "load_min", "0 is an expert without tokens."),
            one_of_each_layer("Spread of the load", "load_cv", "standard deviation, 0 is perfect balance."),
            Panel("Dead experts", ("experts/dead",), "Experts of all layers that got no token in the interval."),
        ),
    ),
    Section(
        "Data and machine",
        "Is it fed what was ordered, and does it fit?",
        (
            Panel(
                "Data mixture",
                ("data/*",),
                "Share of the rows from each source, as seen; dashed in the report: as ordered.",
                percent=True,
            ),
            Panel("Memory", ("memory/*",), "Peaks since the process started.", "GiB"),
            Panel(
                "Checkpoints: time",
                ("checkpoint/seconds", "checkpoint/stalled_seconds"),
                "Until it was on disk, and how long training stood still for it.",
                "seconds",
            ),
            Panel("Checkpoints: size", ("checkpoint/bytes",), "On disk.", "bytes"),
        ),
    ),
)


def outline() -> str:
    """The panels as text."""
    lines = []
    for section in SECTIONS:
        lines += [f"{section.name}: {section.note}"]
        lines += [f"  {panel.title}: {', '.join(panel.metrics)}" for panel in section.panels]
    return "\n".join(lines)


def regex(patterns: tuple[str, ...]) -> str:
    """Names that fit one of the patterns, as the regular expression that a W&B panel wants."""
    return "|".join("^" + ".+".join(map(re.escape, pattern.split("*"))) + "$" for pattern in patterns)


def workspace(project: str, entity: str, name: str) -> Any:
    """The dashboard as a Workspace of wandb_workspaces, not saved. Raises UserError when the package is missing."""
    try:
        import wandb_workspaces.reports.v2 as reports
        import wandb_workspaces.workspaces as workspaces
    except ImportError:
        raise UserError('the dashboard needs wandb-workspaces: pip install "mobilemoe-train[tracking]"') from None

    def chart(panel: Panel) -> Any:
        open_ended = any("*" in metric for metric in panel.metrics)
        return reports.LinePlot(
            title=panel.title,
            x="step",  # logged with every value, and goes back where a resumed run does
            y=[] if open_ended else list(panel.metrics),
            metric_regex=regex(panel.metrics) if open_ended else None,
            title_y=panel.unit or None,
            log_y=panel.logarithmic or None,
            plot_type="stacked-area" if panel.stacked else "line",
        )

    return workspaces.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[
            workspaces.Section(name=section.name, panels=[chart(panel) for panel in section.panels], is_open=True)
            for section in SECTIONS
        ],
    )


def create(project: str, entity: str | None, name: str) -> str:
    """Save the dashboard on W&B as a new workspace view; returns its address.

    Raises:
        UserError: a package is missing, nobody is logged in, or W&B refuses or cannot be reached.
    """
    view = workspace(project, entity or wandb_entity(), name)
    try:
        return view.save().url
    except Exception as error:  # of many kinds: network, login, permission, a project that is not there
        raise UserError(
            f"W&B did not take the dashboard of {view.entity}/{project} (is there a run in that project?):"
            f" {first_line(error)}"
        ) from None


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.dashboard",
        description="Make a Weights & Biases workspace with this project's panels, which docs/dashboard.md explains.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--project", default=Log().project, help="W&B project (default: %(default)s)")
    parser.add_argument("--entity", help="W&B user or team (default: yours)")
    parser.add_argument("--name", default="MobileMoE Train", help="what the view is called (default: %(default)s)")
    parser.add_argument("--dry-run", action="store_true", help="print the panels and do nothing")
    args = parser.parse_args(argv)
    print(outline() if args.dry_run else create(args.project, args.entity, args.name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
