"""What int4 costs: a bf16 model, the same one rounded after training (PTQ), and one trained for it (QAT), side by side.

python -m mm_train.compare_quant --bf16 runs/tiny/sft --qat runs/tiny/qat --control runs/tiny/control \
    --data data/quickstart --sources code,docs,chat --out runs/tiny/quant

PTQ and QAT see the same quantisation, that of the QAT run: int4 weights, int8 activations. QAT has trained on more
tokens than the bf16 model; a control run that has trained on the same ones without quantisation tells what of a
difference comes from that.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from mm_train import config
from mm_train.checkpoint.convert import convert
from mm_train.checkpoint.folders import find
from mm_train.checkpoint.format import open_checkpoint, read_manifest, write_manifest
from mm_train.cli import UserError, command
from mm_train.compare_quant_table import markdown, summary
from mm_train.data import open_sources
from mm_train.files import write_atomic
from mm_train.model import MobileMoE
from mm_train.model_folder import check_same_tokenizer, load_model
from mm_train.parallel.groups import Groups
from mm_train.processes import environment_alone
from mm_train.quant import FakeQuant, enable_fake_quant
from mm_train.recipe_state import differences
from mm_train.routing_record import Choices, RoutingRecord, changed
from mm_train.tokenizer import load_tokenizer
from mm_train.validate import Score, validate

INCOMPLETE = 3  # exit status of eval.run: all is scored for which there is data
KINDS = ("bf16", "ptq", "control", "ptq-control", "qat")


@dataclass
class Measured:
    """One model."""

    kind: str  # one of KINDS
    folder: str  # run or checkpoint whose weights these are
    held_out: dict[str, Score]
    changed_from_bf16: list[float] = field(default_factory=list)  # share of routing decisions by layer; []: it is that
    changed_from_control: list[float] = field(default_factory=list)  # of the same seed; []: there is none
    scores: dict[str, float] = field(default_factory=dict)  # by benchmark


@dataclass(frozen=True)
class Task:
    """What every model is measured on."""

    data: Path
    sources: Sequence[str]
    seq_len: int
    rows: int
    max_tokens: int

    def measure(self, model: MobileMoE) -> tuple[dict[str, Score], Choices]:
        """Held-out scores and routing decisions of a model."""
        readers = open_sources(self.data, self.sources, "val", self.seq_len)
        token_bytes = load_tokenizer(self.data).token_bytes()
        groups = Groups(device=next(model.parameters()).device)
        with RoutingRecord(model) as record:
            how = (self.seq_len, self.rows, groups, self.max_tokens)
            scores = validate(model, readers, token_bytes, *how, seen=record.keep)
        return scores, record.choices


def compare(bf16: Path, qat: Sequence[Path], control: Sequence[Path], task: Task, device: str) -> list[Measured]:
    """Every model, measured. Folders are runs or checkpoints; those of `control` pair with those of `qat`."""
    quant = check(bf16, qat, control)
    found: list[Measured] = []

    def measure(kind: str, folder: Path, model: MobileMoE, *references: Choices) -> Choices:
        scores, choices = task.measure(model)
        from_bf16, from_control = [*(changed(reference, choices) for reference in references), [], []][:2]
        found.append(Measured(kind, str(folder), scores, from_bf16, from_control))
        losses = ", ".join(f"{name} {score.loss:.4f}" for name, score in scores.items())
        print(f"{kind:12s} {folder}  loss {losses}", flush=True)
        return choices

    def quantised(model: MobileMoE) -> MobileMoE:
        enable_fake_quant(model, FakeQuant.of(quant))
        return model

    model = load_model(bf16, device=device)
    reference = measure("bf16", bf16, model)
    measure("ptq", bf16, quantised(model), reference)
    for index, folder in enumerate(qat):
        references = [reference]
        if control:
            model = load_model(control[index], device=device)
            references.append(measure("control", control[index], model, reference))
            measure("ptq-control", control[index], quantised(model), *references)
        measure("qat", folder, load_model(folder, device=device), *references)
    return found


def check(bf16: Path, qat: Sequence[Path], control: Sequence[Path]) -> config.Quant:
    """The quantisation that QAT trained for. Raises UserError when these runs cannot be compared."""
    plain = run_config(bf16)
    quants = []
    for folder in (bf16, *control, *qat):
        cfg = run_config(folder)
        if difference := config.model_difference(plain.model, cfg.model):
            raise UserError(f"{folder} is another model than {bf16}: {difference}")
        if cfg.quant.enabled is not (folder in qat):
            is_qat = "is" if cfg.quant.enabled else "is not"
            raise UserError(
                f"{folder} {is_qat} from quantisation-aware training (quant.enabled): not what it is given as"
            )
        quants += [cfg.quant] if cfg.quant.enabled else []
    if any(quant != quants[0] for quant in quants):
        raise UserError("the runs of --qat were trained for different quantisations: compare them one by one")
    if control and len(control) != len(qat):
        raise UserError(f"--control has {len(control)} runs and --qat {len(qat)}: they belong together in pairs")
    return quants[0]


def cautions(qat: Sequence[Path], control: Sequence[Path]) -> list[str]:
    """In what else than quantisation the pairs differ."""
    notes = []
    for trained, other in zip(qat, control, strict=False):
        here, there = run_config(trained), run_config(other)
        keys = list(differences(there, replace(here, quant=there.quant)))
        steps = [open_checkpoint(find(folder)).step for folder in (trained, other)]
        keys += [f"{steps[1]} steps (QAT: {steps[0]})"] if steps[0] != steps[1] else []
        if keys or here.init_from != there.init_from:
            notes.append(f"{other} differs from {trained} in more than quantisation: {', '.join(keys) or 'init_from'}")
    return notes


def run_config(folder: Path) -> config.Config:
    """The configuration of the newest checkpoint of a run. Raises UserError when there is none."""
    return open_checkpoint(find(folder)).run_config


def add_benchmarks(found: list[Measured], quant: config.Quant, tasks: str, limit: int, data: Path, out: Path) -> None:
    """Scores by eval.run, a process for each model. Those rounded after training get a checkpoint that says so."""
    for index, measured in enumerate(found):
        folder = find(Path(measured.folder))
        place = out / "eval" / f"{index:02d}-{measured.kind}"
        place.mkdir(parents=True, exist_ok=True)
        if measured.kind.startswith("ptq"):
            folder = rounded(folder, quant, place / "checkpoint")
        words = ["--model", str(folder), "--tasks", tasks, "--data", str(data), "--out", str(place)]
        words += ["--limit", str(limit)] if limit else []
        print(f"benchmarks of {measured.kind} {measured.folder}", flush=True)
        done = subprocess.run([sys.executable, "-m", "eval.run", *words], env=environment_alone())
        if done.returncode not in (0, INCOMPLETE):
            raise UserError(f"eval.run failed for {measured.folder} with status {done.returncode}")
        measured.scores = read_scores(place / "results.json")


def rounded(folder: Path, quant: config.Quant, out: Path) -> Path:
    """A copy of a checkpoint's weights that is loaded as if it came from QAT, once made."""
    if not out.exists():
        convert(folder, out, number=1, weights_only=True)
        values = {key: value for key, value in read_manifest(out).items() if key != "sha256"}
        write_manifest(out, values | {"config": values["config"] | {"quant": asdict(quant)}})
    return out


def read_scores(path: Path) -> dict[str, float]:
    """Benchmark -> score of a results.json of eval.run. Raises UserError when it is none."""
    try:
        tasks: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))["tasks"]
        return {name: task["score"] for name, task in tasks.items() if task["score"] is not None}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no results.json of eval.run: {error}") from None


def given_scores(words: Sequence[str]) -> dict[str, dict[str, float]]:
    """--results KIND=FILE. Raises UserError for another kind."""
    found = {}
    for word in words:
        kind, _, path = word.partition("=")
        if kind not in KINDS or not path:
            raise UserError(f"--results {word}: it must be KIND=results.json with KIND one of {', '.join(KINDS)}")
        found[kind] = read_scores(Path(path))
    return found


@command
def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mm_train.compare_quant",
        description="Compare a bf16 model, its post-training quantisation and quantisation-aware training.",
    )
    parser.add_argument("--bf16", required=True, type=Path, help="run or checkpoint that QAT started from")
    parser.add_argument("--qat", required=True, type=Path, nargs="+", help="runs of QAT: one, or a seed each")
    parser.add_argument("--control", type=Path, nargs="+", default=[], help="the same without quantisation, in pairs")
    parser.add_argument("--data", required=True, type=Path, help="data set folder written by data_prep")
    parser.add_argument("--sources", required=True, help="comma-separated source names")
    parser.add_argument("--seq-len", type=int, default=512, help="tokens a row (default %(default)s)")
    parser.add_argument("--rows", type=int, default=8, help="rows at once (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, default=0, help="of each source (default: all that is held out)")
    parser.add_argument("--out", required=True, type=Path, help="folder for compare.md and compare.json")
    parser.add_argument("--eval", metavar="TASKS", help="also score these benchmarks, by eval.run")
    parser.add_argument("--limit", type=int, default=0, help="items of each benchmark (default: all)")
    parser.add_argument("--eval-data", type=Path, default=Path("data/eval"), help="their items (default %(default)s)")
    parser.add_argument("--results", nargs="+", default=[], metavar="KIND=FILE", help="scores from results.json files")
    args = parser.parse_args(argv)
    quant = check(args.bf16, args.qat, args.control)
    longest = run_config(args.bf16).model.max_position_embeddings
    if not 1 <= args.seq_len <= longest or args.rows < 1:
        raise UserError(f"--seq-len {args.seq_len} must lie in 1..{longest} and --rows {args.rows} must be at least 1")
    check_same_tokenizer(args.bf16, load_tokenizer(args.data), args.data)
    given = given_scores(args.results)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task = Task(args.data, args.sources.split(","), args.seq_len, args.rows, args.max_tokens)
    found = compare(args.bf16, args.qat, args.control, task, device)
    for measured in found:
        measured.scores = given.get(measured.kind, {})
    try:
        args.out.mkdir(parents=True, exist_ok=True)
        if args.eval:
            add_benchmarks(found, quant, args.eval, args.limit, args.eval_data, args.out)
        notes = cautions(args.qat, args.control)
        models = [asdict(measured) for measured in found]
        facts = {"quant": asdict(quant), "notes": notes, "models": models, "summary": summary(models)}
        write_atomic(args.out / "compare.json", (json.dumps(facts, indent=1) + "\n").encode())
        text = markdown(facts)
        write_atomic(args.out / "compare.md", text.encode())
    except OSError as error:
        raise UserError(f"cannot write {args.out}: {error.strerror or error}") from None
    print(f"\n{text}\n{args.out / 'compare.md'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
