"""Topology-free checkpoints: whatever layout wrote one, any layout can read it.

    RUN/checkpoints/step-00000100/manifest.json           step, data position, config, where each tensor is, sha256
                                  rank-00000.safetensors  weight/NAME, exp_avg/NAME, exp_avg_sq/NAME: this rank's share
    RUN/checkpoints/latest                                name of the newest complete one

Tensors go by their release names, float32; expert tensors are stored in slices by global expert id. Dense tensors are
shared out over the ranks, so that all write at the same time. A checkpoint is written to a `.partial` folder, synced,
renamed, and only then named by `latest`.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mm_train import config
from mm_train.cli import UserError
from mm_train.engine import MOMENTS, Engine
from mm_train.files import sync
from mm_train.parallel import Groups

FORMAT = "mobilemoe-checkpoint-1"


def save(run_dir: Path, step: int, engine: Engine, groups: Groups, cfg: config.Config, facts: dict[str, Any]) -> Path:
    """Write a checkpoint of `step` and point `latest` at it. Collective; returns its folder.

    `facts` are stored beside the step (data position and fingerprint). Raises UserError when the folder cannot be
    written; nothing that was published before is touched then.
    """
    root = run_dir / "checkpoints"
    final, partial = root / f"step-{step:08d}", root / f"step-{step:08d}.partial"
    if groups.is_main:
        with _write_errors(partial):
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(parents=True)
    groups.barrier()
    share, parts = _share(engine, groups)
    file = partial / f"rank-{groups.rank:05d}.safetensors"
    with _write_errors(file):
        save_file(share, file)
        sync(file)
    record = {"file": file.name, "sha256": _sha256(file), "bytes": file.stat().st_size, "parts": parts}
    records = [record]
    if groups.world > 1:
        records = [{} for _ in range(groups.world)]
        dist.all_gather_object(records, record)
    if groups.is_main:
        manifest = {"format": FORMAT, "step": step, **facts, "config": asdict(cfg)}
        manifest |= {"world": groups.world, "expert_parallel": groups.ep_size, "files": records}
        with _write_errors(partial):
            _publish(root, partial, final, manifest)
        _prune(root, final, cfg.checkpoint.keep)
    groups.barrier()
    return final


def _share(engine: Engine, groups: Groups) -> tuple[dict[str, Tensor], list[dict]]:
    """This rank's tensors to write, and their description."""
    share: dict[str, Tensor] = {}
    parts: list[dict] = []
    num_experts = engine.model.config.num_local_experts
    experts = groups.local_experts(num_experts)
    expert_dp_size = groups.world // groups.ep_size

    def keep(name: str, tensors: dict[str, Tensor], rows: range | None) -> None:
        parts.append({"name": name, "experts": None if rows is None else [rows.start, rows.stop]})
        for kind, tensor in tensors.items():
            share[f"{kind}/{name}"] = tensor.detach().to("cpu", torch.float32, copy=True).contiguous()

    for index, (name, parameter) in enumerate(engine.model.named_parameters()):
        tensors = {"weight": parameter} | engine.moments(parameter)  # collective: all ranks ask for every tensor
        if is_expert(name):
            if index % expert_dp_size == groups.expert_dp_rank:
                keep(name, tensors, experts)
        elif index % groups.world == groups.rank:
            keep(name, tensors, None)
    if groups.is_main:
        for name, buffer in engine.model.named_buffers():
            keep(name, {"weight": buffer}, None)
        share["rng/torch"] = torch.get_rng_state()
    return share, parts


def is_expert(name: str) -> bool:
    """Is this a tensor of routed experts, [E, in, out]?"""
    return ".feed_forward.experts." in name


def _publish(root: Path, partial: Path, final: Path, manifest: dict) -> None:
    path = partial / "manifest.json"
    path.write_text(json.dumps(manifest, indent=1))
    sync(path)
    if final.exists():
        shutil.rmtree(final)
    os.replace(partial, final)
    sync(root)
    pointer = root / "latest.partial"
    pointer.write_text(final.name + "\n")
    sync(pointer)
    os.replace(pointer, root / "latest")
    sync(root)


def _prune(root: Path, newest: Path, keep: int) -> None:
    """Keep `newest` and the `keep` - 1 before it. Later steps are of a run that was rolled back: they go too, as does
    what interrupted writes left behind."""
    kept = sorted(p for p in root.glob("step-*") if p.suffix != ".partial" and p.name <= newest.name)[-keep:]
    for folder in root.glob("step-*"):
        if folder not in kept:
            shutil.rmtree(folder, ignore_errors=True)


def latest(run_dir: Path) -> Path | None:
    """Folder of the newest complete checkpoint of a run, if any."""
    pointer = run_dir / "checkpoints" / "latest"
    return pointer.parent / pointer.read_text().strip() if pointer.is_file() else None


def find(path: Path) -> Path:
    """Checkpoint folder meant by a run folder or a checkpoint folder. Raises UserError when there is none."""
    folder = path if (path / "manifest.json").is_file() else latest(path)
    if folder is None:
        raise UserError(f"no checkpoint in {path}: expected checkpoints/latest of a run, or manifest.json")
    return folder


def read_manifest(folder: Path) -> dict:
    """The manifest of a checkpoint folder. Raises UserError when it is missing, damaged or of another format."""
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read checkpoint manifest {path}: {error}") from None
    if manifest.get("format") != FORMAT:
        raise UserError(f"{path}: format is {manifest.get('format')!r}; this version reads {FORMAT!r}")
    return manifest


class Reader:
    """Tensors of a checkpoint by name, whole or any range of experts. Files are verified before they are read."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.manifest = read_manifest(folder)
        self.where: dict[str, list[tuple[str, list[int] | None]]] = {}
        for record in self.manifest["files"]:
            for part in record["parts"]:
                self.where.setdefault(part["name"], []).append((record["file"], part["experts"]))
        self._sha256 = {record["file"]: record["sha256"] for record in self.manifest["files"]}
        self._opened: dict[str, Any] = {}

    def _file(self, name: str) -> Any:
        """The open file `name`, verified when it is first needed."""
        if name not in self._opened:
            path = self.folder / Path(name).name
            try:
                if _sha256(path) != self._sha256[name]:
                    raise UserError(f"checkpoint file {path} is damaged: its sha256 is not the one in the manifest")
                self._opened[name] = safe_open(path, "pt")
            except (OSError, SafetensorError) as error:
                raise UserError(f"cannot read checkpoint file {path}: {error}") from None
        return self._opened[name]

    @property
    def model_config(self) -> config.Model:
        return self.run_config.model

    @property
    def run_config(self) -> config.Config:
        """The resolved config of the run that wrote the checkpoint."""
        return config.from_dict(self.manifest["config"], str(self.folder))

    def read(self, name: str, kind: str = "weight", experts: range | None = None) -> Tensor:
        """Tensor `name`; `experts` selects global expert ids of an expert tensor (None: all)."""
        parts = sorted(self.where.get(name, []), key=lambda part: part[1] or [0])
        if not parts:
            raise UserError(f"checkpoint {self.folder} has no tensor {name}")
        if parts[0][1] is None:
            return self._file(parts[0][0]).get_tensor(f"{kind}/{name}")
        wanted = range(self.model_config.num_local_experts) if experts is None else experts
        slices = []
        for file, (start, stop) in ((file, span) for file, span in parts if span is not None):
            low, high = max(start, wanted.start), min(stop, wanted.stop)
            if low < high:
                slices.append(self._file(file).get_slice(f"{kind}/{name}")[low - start : high - start])
        found = torch.cat(slices) if slices else torch.empty(0)
        if found.shape[0] != len(wanted):
            raise UserError(f"checkpoint {self.folder} holds {found.shape[0]} of the {len(wanted)} experts of {name}")
        return found

    def weights(self) -> dict[str, Tensor]:
        """All weights, whole."""
        return {name: self.read(name) for name in self.where}

    def rng_state(self) -> Tensor:
        """torch's random state on the main rank."""
        return self._file(self.manifest["files"][0]["file"]).get_tensor("rng/torch")

    def check_model(self, model: config.Model) -> None:
        """Raises UserError when the checkpoint is of another network; names the first key that differs."""
        difference = config.model_difference(model, self.model_config)
        if difference:
            raise UserError(f"checkpoint {self.folder} is of another model: {difference}")


@torch.no_grad()
def restore(reader: Reader, engine: Engine, groups: Groups) -> None:
    """Load weights, optimizer state and RNG into an engine of any layout."""
    mine = groups.local_experts(engine.model.config.num_local_experts)
    for name, parameter in engine.model.named_parameters():
        state = {kind: reader.read(name, kind, mine).to(groups.device) for kind in MOMENTS}
        engine.restore(parameter, reader.read(name, "weight", mine).to(groups.device), state)
    for name, buffer in engine.model.named_buffers():
        buffer.copy_(reader.read(name))
    engine.restore_step(reader.manifest["step"])
    torch.set_rng_state(reader.rng_state())


def check_data(reader: Reader, fingerprint: str, global_rows: int) -> None:
    """Raises UserError when resuming would not continue the same stream of samples."""
    manifest = reader.manifest
    if manifest["data_fingerprint"] != fingerprint:
        raise UserError(
            f"checkpoint {reader.folder} was trained on other data: the mixture, its shards, data.seq_len or train.seed"
            " changed; use a new run.dir with init_from to start a new stage from its weights"
        )
    if manifest["samples"] != manifest["step"] * global_rows:
        raise UserError(
            f"checkpoint {reader.folder} had {manifest['samples'] // manifest['step']} rows a step, now {global_rows}:"
            " train.global_batch_tokens or data.seq_len changed"
        )


@contextlib.contextmanager
def _write_errors(path: Path) -> Iterator[None]:
    """What goes wrong while writing `path`, as one clear error."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"cannot write checkpoint {path}: {getattr(error, 'strerror', None) or error}") from None


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
