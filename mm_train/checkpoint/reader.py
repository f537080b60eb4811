"""Reading checkpoints: any block of any tensor out of parts that any layout has stored, and going on from there."""

import math
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_train import config, inventory
from mm_train.checkpoint.boxes import blocks, intersection, relative
from mm_train.checkpoint.files import VectorFile
from mm_train.checkpoint.folders import candidates, root_of
from mm_train.checkpoint.format import FACTS, RNG, Damaged, Part, damaged_files, open_checkpoint, unreadable
from mm_train.cli import UserError
from mm_train.engine import Engine
from mm_train.inventory import KINDS
from mm_train.parallel.groups import Groups
from mm_train.sharding import Box, local_boxes, whole

OPEN_FILES = 64  # at a time: a checkpoint has one for each rank, and processes may have few
PIECE_BYTES = 16 << 20  # read at a time where what is stored has to be cut


class Reader:
    """Tensors of a checkpoint by name and kind, whole or any block or range of them, always float32 on the CPU.

    Only what is wanted is read, into the tensor that is returned. Opening it checks the manifest and the lengths of the
    files; `verify` their contents. Raises UserError for what is damaged, by name.
    """

    def __init__(self, folder: Path) -> None:
        self._checkpoint = open_checkpoint(folder)
        self.folder = folder
        self.manifest = self._checkpoint.manifest
        self.step = self._checkpoint.step
        self.kinds, self.kinds_of = self._checkpoint.kinds, self._checkpoint.kinds_of
        self.records = self._checkpoint.records
        self._parts: dict[str, list[tuple[str, Part]]] = {}
        for record in self.records:
            for part in record.parts:
                self._parts.setdefault(part.name, []).append((record.file, part))
        self._opened: dict[str, VectorFile] = {}

    @property
    def run_config(self) -> config.Config:
        """The resolved config of the run that wrote the checkpoint."""
        return self._checkpoint.run_config

    @property
    def model_config(self) -> config.Model:
        return self.run_config.model

    def verify(self, groups: Groups | None = None) -> "Reader":
        """Hash all files; returns itself. Raises UserError for one that is damaged or cannot be read.

        Collective when `groups` are given: the ranks share the work, and all of them raise.
        """
        groups = groups or Groups()
        found: Sequence[UserError]
        try:
            found = damaged_files(self.folder, self.records[groups.rank :: groups.world])
        except UserError as error:
            found = [error]
        for reports in groups.gather([str(error) for error in found]):
            if reports:
                raise UserError(reports[0])
        return self

    @cached_property
    def entries(self) -> dict[str, inventory.Entry]:
        """Name -> shape and part of each tensor, in the module's order."""
        return {entry.name: entry for entry in inventory.tensors(self.model_config)}

    def names(self) -> list[str]:
        """Of all tensors, buffers included, in the module's order."""
        return list(self.entries)

    def read(self, name: str, kind: str = "weight", box: Box | None = None) -> Tensor:
        """A tensor, or the block `box` of it. Kinds: weight, exp_avg, exp_avg_sq."""
        entry = self.entries.get(name)
        if entry is None:
            raise UserError(f"checkpoint {self.folder} has no tensor {name}")
        box = whole(entry.shape) if box is None else box
        return self.read_range(name, kind, box, 0, box.size).view(box.shape)

    def read_range(self, name: str, kind: str, box: Box, start: int, stop: int) -> Tensor:
        """Elements start..stop, row by row, of the block `box` of a tensor: 1-D."""
        if kind not in self.kinds_of[name]:
            held = ", ".join(self.kinds_of[name])
            raise UserError(f"checkpoint {self.folder} has no {kind} of {name}: it holds {held}")
        found = torch.empty(stop - start)
        wanted = blocks(box, start, stop)
        filled = 0
        for file, part in self._parts.get(name, []):
            if intersection(part.box, box) is None:
                continue
            for offset, stored in blocks(part.box, part.start, part.stop):
                for target_offset, target in wanted:
                    common = intersection(stored, target)
                    if common is not None:
                        room = found[target_offset : target_offset + target.size].view(target.shape)
                        key = f"{kind}/{part.key}"
                        self._copy(file, key, offset, stored, common, room[relative(common, target)])
                        filled += common.size
        if filled != stop - start:  # the manifest as a whole was found complete
            raise UserError(f"checkpoint {self.folder} holds {filled:,} of the {stop - start:,} elements of {name}")
        return found

    def _copy(self, file: str, key: str, offset: int, stored: Box, common: Box, target: Tensor) -> None:
        """Fill `target` with `common`, out of the block `stored`, which begins at element `offset` of vector `key`."""
        axis = next((i for i, length in enumerate(common.shape) if length > 1), len(common.shape) - 1)
        row = math.prod(stored.shape[axis + 1 :])  # elements; rows along `axis` follow each other in the file
        for i in range(axis + 1):  # to the first of them
            offset += (common.start[i] - stored.start[i]) * math.prod(stored.shape[i + 1 :])
        count = common.shape[axis]
        if target.is_contiguous() and common.size == count * row:
            self._fill(file, key, offset, target.view(-1))
            return
        inside = relative(common, stored)[axis + 1 :]
        rows = max(1, PIECE_BYTES // (4 * row))
        for done in range(0, count, rows):
            piece = torch.empty(min(rows, count - done), *stored.shape[axis + 1 :])
            self._fill(file, key, offset + done * row, piece.view(-1))
            into = target.narrow(axis, done, piece.shape[0])
            into.copy_(piece[(slice(None), *inside)].view_as(into))

    def _fill(self, file: str, key: str, start: int, target: Tensor) -> None:
        """Read elements of a vector of a file, from `start` on, into a contiguous vector."""
        try:
            if file not in self._opened:
                if len(self._opened) >= OPEN_FILES:
                    self._opened.pop(next(iter(self._opened)))
                self._opened[file] = VectorFile(self.folder / file)
            self._opened[file].read_into(key, start, target.numpy().data.cast("B"))
        except OSError as error:
            raise unreadable(self.folder, file, error) from None
        except ValueError as error:
            raise Damaged(self.folder, file, error) from None

    def weights(self) -> dict[str, Tensor]:
        """All weights and buffers, whole."""
        return {name: self.read(name) for name in self.names()}

    def rng_state(self) -> Tensor:
        """torch's random state on the main rank."""
        file = self.records[0].file
        try:
            opened = VectorFile(self.folder / file)
            length = next(vector.length for vector in opened.vectors() if vector.key == RNG)
        except StopIteration:
            raise Damaged(self.folder, file, f"it holds no tensor {RNG}") from None
        except OSError as error:
            raise unreadable(self.folder, file, error) from None
        except ValueError as error:
            raise Damaged(self.folder, file, error) from None
        state = torch.empty(length, dtype=torch.uint8)
        self._fill(file, RNG, 0, state)
        return state

    def check_model(self, model: config.Model) -> None:
        """Raises UserError when the checkpoint is of another network; names the first key that differs."""
        difference = config.model_difference(model, self.model_config)
        if difference:
            raise UserError(f"checkpoint {self.folder} is of another model: {difference}")

    def check_optimizer(self, optim: config.Optim) -> None:
        """Raises UserError when the optimizer in use cannot go on with the moments of the checkpoint."""
        there = self.run_config.optim.name
        if there != optim.name:
            raise UserError(
                f"checkpoint {self.folder} has the moments of optim.name={there}; {optim.name} cannot go on with them:"
                f" keep optim.name={there}, or start a new stage from its weights in another run.dir with init_from"
            )


def open_newest(run_dir: Path, groups: Groups, say: Callable[[str], object]) -> Reader | None:
    """The newest checkpoint of a run of which every byte is as it was written; None when there is none. Collective.

    The ranks share out the hashing. Tells `say`, on the main rank, of everything that is not as it should be. Raises
    UserError on every rank when there are checkpoints and none is good (a run never starts anew by mistake), and when
    any rank cannot read one that may be good (a run never falls behind it for an error that may pass).
    """
    names, trouble, refusal = groups.gather(_candidates(run_dir) if groups.is_main else None)[0]
    if refusal:
        raise UserError(refusal)
    if trouble and not names:
        raise UserError(f"{trouble}: remove it if training is to start anew")
    if trouble and groups.is_main:
        say(f"{trouble}: looking at all checkpoints")
    bad: list[str] = []
    for index, name in enumerate(names):
        reader, damage, refusal = _try(root_of(run_dir) / name, groups)
        reports = groups.gather((damage, refusal))
        for _, refused in reports:
            if refused:
                raise UserError(refused)
        bad += [damaged for damaged, _ in reports if damaged][:1]
        if len(bad) == index:
            return reader
        if index + 1 < len(names) and groups.is_main:
            say(f"{bad[-1]}; trying {names[index + 1]}")
    if bad:
        raise UserError(f"no checkpoint in {root_of(run_dir)} can be used: {'; '.join(bad)}; mend or remove them")
    return None


def _try(folder: Path, groups: Groups) -> tuple[Reader | None, str | None, str | None]:
    """(reader, what is damaged as far as this rank has looked, why the run cannot go on, with an older one neither)."""
    try:
        reader = Reader(folder)
        damaged = damaged_files(folder, reader.records[groups.rank :: groups.world])
    except Damaged as damage:
        return None, damage.short, None
    except UserError as error:  # cannot be read now; or of another format or with an unknown config, as older ones are
        return None, None, str(error)
    return reader, damaged[0].short if damaged else None, None


def _candidates(run_dir: Path) -> tuple[list[str], str | None, str | None]:
    """(names of `candidates`, what is wrong with `latest`, why they cannot be found)."""
    try:
        folders, trouble = candidates(run_dir)
    except UserError as error:
        return [], None, str(error)
    return [folder.name for folder in folders], trouble, None


@torch.no_grad()
def restore(reader: Reader, engine: Engine, groups: Groups) -> None:
    """Load weights, optimizer state and, on the main rank, torch's random state into an engine of any layout.

    A tensor of this rank at a time; every rank reads for itself. Raises UserError for a checkpoint without moments.
    The optimizer has to be the one that wrote it (Reader.check_optimizer).
    """
    if reader.kinds != KINDS:
        raise UserError(f"checkpoint {reader.folder} holds weights only: start a new stage from it with init_from")
    buffers = dict(engine.model.named_buffers())
    for entry, box in local_boxes(engine.model.config, groups.place):
        if entry.name in buffers:
            buffers[entry.name].copy_(reader.read(entry.name))
        else:
            engine.restore(entry.name, partial(_read_local, reader, entry.name, box))
    engine.restore_step(reader.step)
    if groups.is_main:
        torch.set_rng_state(reader.rng_state())


def _read_local(reader: Reader, name: str, box: Box, kind: str, start: int, stop: int) -> Tensor:
    return reader.read_range(name, kind, box, start, stop)


def check_data(reader: Reader, identity: dict[str, Any], global_rows: int, mixture_has_changed: bool = False) -> None:
    """Raises UserError when going on would not continue the same stream of samples; says what differs or is missing.

    `identity` is data.Loader.identity, `global_rows` the number of samples of an optimizer step. With
    `mixture_has_changed`, which the user then wants, seed and length have to be the same, but not the sources.
    """
    manifest = reader.manifest
    for key in FACTS:
        if key not in manifest:
            raise UserError(f"checkpoint {reader.folder} does not say its {key}: nothing can be continued from it")
    free = ("sources", "since") if mixture_has_changed else ()
    difference = data_difference(identity, manifest["data"] | {key: identity[key] for key in free})
    if difference:
        same = all(identity.get(key) == manifest["data"].get(key) for key in ("seed", "seq_len"))
        raise UserError(
            f"checkpoint {reader.folder} was trained on other data: {difference}; use a new run.dir with init_from to"
            " start a new stage from its weights"
            + (", or data.on_change=continue to go on with the new mixture from here" if same else "")
        )
    rows, samples = manifest["rows_per_step"], manifest["samples"]
    if rows != global_rows:
        raise UserError(
            f"checkpoint {reader.folder} had {rows} rows a step, now {global_rows}: train.global_batch_tokens or"
            " data.seq_len changed"
        )
    left_out = samples - reader.step * rows  # after a rollback
    if left_out < 0 or left_out % rows:
        raise UserError(f"checkpoint {reader.folder} says that {samples} samples made {reader.step} steps of {rows}")


def data_difference(here: dict[str, Any], there: dict[str, Any]) -> str | None:
    """The first thing in which two identities of a data.Loader differ, in words; None when there is none."""
    for key, name in {"seed": "train.seed", "seq_len": "data.seq_len"}.items():
        if here.get(key) != there.get(key):
            return f"{name} is {there.get(key)} there and {here.get(key)} here"
    ours, theirs = here["sources"], there["sources"]
    for source in [*theirs, *ours]:
        if source not in ours:
            return f"its source {source} is missing here"
        if source not in theirs:
            return f"source {source} is not among its sources"
        for key, name in {"samples_in_1000": "samples in 1000", "shards": "sha256 of its shards"}.items():
            mine, its = (str(values[source].get(key)) for values in (ours, theirs))
            if mine != its:
                return f"source {source}, {name}: {its[:12]} there and {mine[:12]} here"
    rest = [key for key in {*here, *there} if here.get(key) != there.get(key)]
    return f"{rest[0]} differs" if rest else None
