"""The checkpoints of a run: which there are, which counts, how a new one takes its place. Torch-free.

    checkpoints/step-00000100            complete: it was renamed only when every byte of it was on the disk
                step-00000200.partial    being written, or left behind by a write that was interrupted
                step-00000100.replaced   was published before under this step; counts while step-00000100 is missing
                step-00000050.removed    being deleted
                step-00000050.in-use     a file: somebody reads step-00000050, which stays as long as this is there
                latest                   name of the newest one and digest of its manifest, or a name written by hand

Every change is one rename, so that a process may be killed between any two of them.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
from pathlib import Path

from mm_train.checkpoint.format import MANIFEST, MISSING, Damaged, name_of_step, open_checkpoint, read_manifest
from mm_train.cli import UserError
from mm_train.files import is_file, is_folder, sync, write_atomic

NAME = re.compile(r"step-(\d{8,})(\.replaced)?")
IN_USE = ".in-use"
LATEST = "latest"
POINTER = re.compile(r"(?P<name>step-(?P<step>\d{8,})(\.replaced)?)(\n?| (?P<digest>[0-9a-f]{64})\n)")  # what it says


def root_of(run_dir: Path) -> Path:
    """Where a run has its checkpoints."""
    return run_dir / "checkpoints"


def step_of(folder: Path) -> int | None:
    """Step of a complete checkpoint, by its name."""
    match = NAME.fullmatch(folder.name)
    return int(match[1]) if match else None


def complete(run_dir: Path) -> list[Path]:
    """Folders of the complete checkpoints of a run, newest first; their contents may be damaged since.

    Raises UserError when their folder is there and cannot be read.
    """
    try:
        names = sorted(os.listdir(root_of(run_dir)), reverse=True)  # X.replaced comes before X, which overrules it
        found = {int(match[1]): root_of(run_dir) / name for name in names if (match := NAME.fullmatch(name))}
        return [found[step] for step in sorted(found, reverse=True) if _is_folder(found[step])]
    except OSError as error:
        if error.errno in (*MISSING, errno.ENAMETOOLONG):
            return []
        raise UserError(f"cannot read {root_of(run_dir)}: {error.strerror or error}; nothing was changed") from None


def _is_folder(path: Path) -> bool:
    try:
        return stat.S_ISDIR(path.stat().st_mode)
    except OSError as error:
        if error.errno in MISSING:
            return False
        raise


def candidates(run_dir: Path) -> tuple[list[Path], str | None]:
    """Checkpoints that a run may go on from, best first, and what is wrong with `latest`, if anything.

    Those after `latest` belong to a part of the run that was given up. Without a `latest` that can be trusted, all.
    Raises UserError when something is there and cannot be read.
    """
    found = complete(run_dir)
    if not found:
        path = root_of(run_dir) / LATEST
        return [], f"{path} is there, but no checkpoint is" if is_file(path) else None
    step, trouble = _read_latest(run_dir, found)
    if step is None:
        return found, trouble
    return [folder for folder in found if (step_of(folder) or 0) <= step], None


def _read_latest(run_dir: Path, found: list[Path]) -> tuple[int | None, str | None]:
    """(step of the newest checkpoint, None) as `latest` has it, or (None, what is wrong with it)."""
    path = root_of(run_dir) / LATEST
    try:
        text = path.read_text(encoding="ascii")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in MISSING:
            raise UserError(f"cannot read {path}: {error.strerror or error}; nothing was changed") from None
        return None, f"{path} cannot be read ({getattr(error, 'strerror', None) or type(error).__name__})"
    match = POINTER.fullmatch(text)
    if not match:
        return None, f"{path} is damaged"
    name, step, digest = match["name"], int(match["step"]), match["digest"]
    folder = next((folder for folder in found if step_of(folder) == step), None)
    if folder is None:
        return None, f"{path} names {name}, which is missing"
    if digest:
        with contextlib.suppress(UserError):  # a manifest that is not in order is noticed when the checkpoint is read
            if read_manifest(folder)["sha256"] != digest:
                return None, f"{path} does not fit the manifest of {folder.name}"
    return step, None


def latest(run_dir: Path) -> Path | None:
    """Folder of a run's newest checkpoint that looks good: manifest in order, files there. None if there is none.

    For what is said of a run; `find` and reader.open_newest pass over damaged ones only.
    """
    with contextlib.suppress(UserError):
        for folder in candidates(run_dir)[0]:
            with contextlib.suppress(UserError):
                return open_checkpoint(folder).folder
    return None


def find(path: Path) -> Path:
    """Checkpoint folder meant by a run folder (its newest that looks good) or a checkpoint folder.

    Raises UserError if there is none, and for one that is not damaged and cannot be read: an older one is not meant.
    """
    if is_file(path / MANIFEST) or (NAME.fullmatch(path.name) and is_folder(path)):
        return path
    damage = None
    for folder in candidates(path)[0]:
        try:
            return open_checkpoint(folder).folder
        except Damaged as error:
            damage = damage or error
    raise damage or UserError(f"no checkpoint in {path}: expected checkpoints/{LATEST} of a run, or {MANIFEST}")


def publish(partial: Path, digest: str) -> Path:
    """Give a folder that is complete and on the disk its final name, and point `latest` at it. Raises OSError.

    A checkpoint of this step that is there already stays until the new one has taken its place.
    """
    root, final = partial.parent, partial.with_suffix("")
    if final.exists():
        replaced = final.with_name(final.name + ".replaced")
        remove(replaced)
        os.rename(final, replaced)
    os.rename(partial, final)
    sync(root)
    write_atomic(root / LATEST, f"{final.name} {digest}\n".encode())
    return final


def prune(run_dir: Path, newest: int, keep: int, keep_every: int, always: int | None = None) -> None:
    """Remove checkpoints but the `keep` newest up to step `newest`, multiples of `keep_every` (0: none) and `always`.

    Later ones are of a part of the run that was given up: they go too, as does what interrupted writes left. Those in
    use stay, and what cannot be removed.
    """
    try:
        found = complete(run_dir)
    except UserError:
        return
    steps = [step for folder in found if (step := step_of(folder)) is not None and step <= newest]
    kept = {*steps[:keep], *(step for step in steps if keep_every and step % keep_every == 0), always}
    kept |= {step for folder in held(run_dir) if (step := step_of(folder)) is not None}
    for folder in root_of(run_dir).glob("step-*.replaced"):  # first: they would count again without those below
        if folder.with_suffix("") in found:
            remove(folder)
    for folder in found:
        if step_of(folder) not in kept:
            remove(folder)
    sweep(run_dir)


def sweep(run_dir: Path) -> None:
    """Remove what interrupted writes and removals left behind."""
    for pattern in ("step-*.partial", "step-*.removed"):
        for folder in root_of(run_dir).glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Delete a checkpoint, if it can be; half of one is never taken for one."""
    doomed = folder.with_name(folder.name + ".removed")
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        os.rename(folder, doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def hold(folder: Path) -> None:
    """Keep a checkpoint until `let_go`, also when this process has ended. Raises OSError when that cannot be noted."""
    folder.with_name(folder.name + IN_USE).touch()


def let_go(folder: Path) -> None:
    """The checkpoint may be removed again, by the next save that has a reason to."""
    with contextlib.suppress(OSError):
        folder.with_name(folder.name + IN_USE).unlink()


def held(run_dir: Path) -> list[Path]:
    """Checkpoints in use, oldest first; they may be gone all the same, if somebody removed them by hand."""
    notes = sorted(root_of(run_dir).glob(f"step-*{IN_USE}"))
    return [folder for note in notes if step_of(folder := note.with_name(note.name.removesuffix(IN_USE))) is not None]


def partial_of(run_dir: Path, step: int) -> Path:
    """Where a checkpoint of `step` is written."""
    return root_of(run_dir) / (name_of_step(step) + ".partial")
