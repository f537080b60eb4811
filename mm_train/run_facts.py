"""How the weights of a run came about, gathered from the run folders behind it for the model card. Torch-free.

What is not recorded is left out, never guessed.
"""

from pathlib import Path
from typing import Any

from mm_train import config
from mm_train.checkpoint.folders import latest, step_of
from mm_train.cli import UserError
from mm_train.manifest import read_manifest
from mm_train.run_folder import read_stage


def run_facts(run: Path) -> dict[str, Any]:
    """What is known of how the weights of a run or checkpoint folder came about, for mm_train.model_card.

    `stages`, first to last, follows `init_from` back as far as the folders exist. Each has `stage`, and where they are
    recorded `steps`, `tokens`, `seq_len`, `quantisation_aware`, `data` (source -> share of the mixture and licence),
    `bits_per_byte` (held-out source -> value), and `init_from` when the folder before it is not a run that is still
    there. JSON values only. No record at all: {}.
    """
    stages: list[dict[str, Any]] = []
    seen: set[Path] = set()
    folder: Path | None = run
    while folder is not None:
        step = None
        if folder.parent.name == "checkpoints":  # a checkpoint of a run
            step, folder = step_of(folder), folder.parent.parent
        if folder.resolve() in seen or not (folder / "metrics.jsonl").is_file():
            break
        seen.add(folder.resolve())
        try:
            facts, folder = _stage_facts(folder, step)
        except UserError:  # a damaged record
            break
        if stages:
            del stages[0]["init_from"]
        stages.insert(0, facts)
    return {"stages": stages} if stages else {}


def _stage_facts(run: Path, step: int | None) -> tuple[dict[str, Any], Path | None]:
    """Facts of one run, up to its checkpoint `step` (None: the latest), and the folder it was initialised from."""
    stage = read_stage(run)
    step = step or _latest_step(run) or stage.steps
    facts: dict[str, Any] = {"stage": stage.name}
    if step:
        facts["steps"] = step
        batch = stage.facts.get("global_batch_tokens")
        facts |= {"tokens": step * batch} if batch else {}
    measured = {
        source: records[-1]["bits_per_byte"]
        for source, all_records in stage.validation.items()
        if (records := [r for r in all_records if r["step"] <= step and r.get("bits_per_byte") is not None])
    }
    facts |= {"bits_per_byte": measured} if measured else {}
    try:
        cfg = config.load([run / "config.yaml"], check=lambda _: None)
    except UserError:  # missing, or of another version
        return facts, None
    facts |= {"seq_len": cfg.data.seq_len, "quantisation_aware": cfg.quant.enabled}
    total = sum(cfg.data.mixture.values())
    facts["data"] = {
        source: {"weight": weight / total} | _licence(Path(cfg.data.path) / source)
        for source, weight in cfg.data.mixture.items()
        if weight > 0
    }
    if cfg.init_from:
        facts["init_from"] = Path(cfg.init_from).name
    return facts, Path(cfg.init_from) if cfg.init_from else None


def _licence(source: Path) -> dict[str, str]:
    """The licence of a data source, if its shards are still there."""
    try:
        return {"licence": read_manifest(source / "train").licence}
    except (UserError, OSError):
        return {}


def _latest_step(run: Path) -> int | None:
    """Step of a run's newest checkpoint."""
    folder = latest(run)
    return None if folder is None else step_of(folder)
