"""What is in a checkpoint, and whether it is still what was written: for people and, as JSON, for programs.

Torch-free, unless tensors are looked into.
"""

import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mm_train import inventory
from mm_train.checkpoint.folders import candidates, complete, find, step_of
from mm_train.checkpoint.format import Checkpoint, Damaged, damaged_files, open_checkpoint
from mm_train.cli import UserError


def inspect(path: Path, with_tensors: bool) -> dict[str, Any]:
    """Facts of a checkpoint, or of a run's newest and which others there are; if wanted, with every tensor's norm."""
    found = open_checkpoint(find(path))
    manifest, cfg = found.manifest, found.run_config
    facts: dict[str, Any] = {"folder": str(found.folder), "step": found.step}
    facts |= {key: manifest.get(key) for key in ("written", "layout", "samples", "rows_per_step", "data")}
    if "average" in manifest:
        facts["average"] = manifest["average"]
    facts |= {
        "stage": cfg.run.stage,
        "model": cfg.model.name,
        "parameters": sum(inventory.parameters(cfg.model).values()),
        "kinds": list(found.kinds),
        "bytes": found.bytes,
        "files": [{"file": r.file, "bytes": r.bytes, "sha256": r.sha256, "parts": len(r.parts)} for r in found.records],
    }
    if complete(path):
        facts["checkpoints"] = [_summary(folder) for folder in complete(path)]
        trouble = candidates(path)[1]
        facts |= {"trouble": trouble} if trouble else {}
    if with_tensors:
        facts["tensors"] = list(_tensors(found))
    return facts


def _summary(folder: Path) -> dict[str, Any]:
    """One line on a checkpoint of a run."""
    try:
        found = open_checkpoint(folder)
    except UserError as error:
        return {"step": step_of(folder), "folder": folder.name, "trouble": str(error)}
    facts = {"step": found.step, "folder": folder.name, "written": found.manifest.get("written")}
    return facts | {"bytes": found.bytes, "files": len(found.records)}


def _tensors(found: Checkpoint) -> Iterator[dict[str, Any]]:
    import torch

    from mm_train.checkpoint.reader import Reader

    reader = Reader(found.folder)
    for name, entry in tqdm(reader.entries.items(), unit="tensor", disable=None, leave=False):
        facts = {"name": name, "shape": list(entry.shape), "part": entry.part}
        for kind in found.kinds_of[name]:
            facts[kind] = float(torch.linalg.vector_norm(reader.read(name, kind), dtype=torch.float64))
        yield facts


def inspect_text(facts: dict[str, Any]) -> Iterator[str]:
    """The lines that people see."""
    yield f"checkpoint {facts['folder']}"
    layout = facts["layout"] or {}
    keys = ", ".join(f"{key} {value}" for key, value in layout.items() if key != "world")
    rows = {"step": f"{facts['step']:,}", "written": facts["written"], "by": f"{layout.get('world')} processes: {keys}"}
    if facts["samples"] is not None:
        each = f", {facts['rows_per_step']:,} a step" if facts["rows_per_step"] else ""
        rows["data"] = f"{facts['samples']:,} samples{each}" + _mixture(facts["data"])
    rows["model"] = f"{facts['model']}, {facts['parameters']:,} parameters, stage {facts['stage']}"
    if "average" in facts:
        rows["average"] = "of steps " + ", ".join(f"{s['step']:,} ({s['share']:.3g})" for s in facts["average"])
    rows["holds"] = ", ".join(facts["kinds"])
    rows["files"] = f"{len(facts['files'])}, {facts['bytes']:,} bytes"
    for name, value in rows.items():
        if value:
            yield f"  {name:<8} {value}"
    for file in facts["files"]:
        yield f"    {file['file']}  {file['bytes']:>16,} bytes  {file['parts']:>6,} parts  sha256 {file['sha256'][:12]}"
    if "checkpoints" in facts:
        yield f"the run has {len(facts['checkpoints'])}:"
        for row in facts["checkpoints"]:
            what = row.get("trouble") or f"{row['written']}  {row['bytes']:>16,} bytes in {row['files']}"
            yield f"  {row['folder']}  {what}"
    if "trouble" in facts:
        yield f"  {facts['trouble']}"
    if "tensors" in facts:
        yield from _table(facts["tensors"], facts["kinds"])


def _mixture(data: Any) -> str:
    sources = data.get("sources", {}) if isinstance(data, dict) else {}
    shares = (f"{name} {values.get('samples_in_1000', '?')}" for name, values in sources.items())
    return f"; in 1000: {', '.join(shares)}" if sources else ""


def _table(tensors: Sequence[dict[str, Any]], kinds: Sequence[str]) -> Iterator[str]:
    width = max(len(row["name"]) for row in tensors)
    yield f"{'tensor':<{width}}  {'shape':>18}  {'part':<14}" + "".join(f"  {'|' + kind + '|':>12}" for kind in kinds)
    for row in tensors:
        shape = " x ".join(map(str, row["shape"]))
        norms = "".join(f"  {row[kind]:>12.6g}" if kind in row else "" for kind in kinds)
        yield f"{row['name']:<{width}}  {shape:>18}  {row['part']:<14}{norms}"


def verify(path: Path) -> Iterator[tuple[bool, str]]:
    """(is it as it was written?, what to say) of every checkpoint of a run, or of one, while their files are hashed."""
    folders = complete(path) or [find(path)]
    trouble = candidates(path)[1]
    if trouble:
        yield False, f"DAMAGED  {trouble}"
    lock = threading.Lock()
    for folder in folders:
        try:
            found = open_checkpoint(folder)
        except UserError as error:
            yield False, _refused(error)
            continue
        begun = time.perf_counter()
        options: dict[str, Any] = {"unit": "B", "unit_scale": True, "disable": None, "leave": False}
        with tqdm(total=found.bytes, desc=folder.name, **options) as bar:

            def progress(size: int, bar: tqdm = bar) -> None:
                with lock:
                    bar.update(size)

            try:
                refused: Sequence[UserError] = damaged_files(folder, found.records, progress)
            except UserError as error:
                refused = [error]
        speed = found.bytes / 1e6 / max(1e-9, time.perf_counter() - begun)
        yield from ((False, _refused(error)) for error in refused)
        if not refused:
            yield True, f"ok       {folder}: {len(found.records)} files, {found.bytes:,} bytes, {speed:,.0f} MB/s"


def _refused(error: UserError) -> str:
    return f"{'DAMAGED' if isinstance(error, Damaged) else 'refused'}  {error}"
