"""Writing checkpoints while training goes on: each rank its own file, rank 0 what holds them together.

A rank's thread copies what the rank answers for, while the next step computes its gradients, and writes it to
`step-N.partial/rank-R.safetensors`, with a sidecar rank-R.json once it is on the disk, or has failed. Rank 0's thread
waits for the sidecars, makes the manifest of them and publishes the folder. There are collectives in `save`, none in
the threads.
"""

import contextlib
import errno
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mm_train import config
from mm_train.checkpoint import files
from mm_train.checkpoint.folders import hold, partial_of, prune, publish, remove, root_of, sweep
from mm_train.checkpoint.format import FORMAT, Part, open_checkpoint, write_manifest
from mm_train.checkpoint.share import Staging, as_bytes, in_words, share_of
from mm_train.cli import UserError
from mm_train.engine import Engine
from mm_train.files import sync, write_atomic
from mm_train.inventory import KINDS
from mm_train.parallel.groups import Groups, uses_deepspeed

SIDECARS_SECONDS = 30 * 60  # that rank 0 waits for the files of the others, at most
BEAT_SECONDS = 1.0  # between two looks at a write that is waited for
AFTER_FAILURE_SECONDS = 60  # likewise, when the checkpoint is lost anyway: then only to tidy up behind them
SPARE_BYTES = 16 << 20  # beside the tensors: headers, manifest, sidecars


class Written(NamedTuple):
    """A checkpoint of which this rank's part is done: on rank 0, it is published."""

    step: int
    seconds: float  # since `save` was called
    bytes: int  # of all its files on rank 0, of its own file on another rank
    folder: Path


class Job(NamedTuple):
    """A rank's part of a checkpoint, ready to be written."""

    step: int
    vectors: list[files.Vector]  # of the file
    tensors: Sequence[Tensor]  # that are still to be copied
    buffers: Iterable[memoryview]  # to be written, when there are none to be copied
    parts: list[Part]
    manifest: dict[str, Any]  # all but the files
    begun: float


class Writer:
    """Saves the checkpoints of a run. One for each process and run: it keeps the memory for the copy.

    `timeout` is for how many seconds rank 0 waits for the files of other ranks; it gives up before the watchdog, which
    knows only that something hangs. `beat` is called now and then where the caller waits for a write that moves on: a
    slow disk is no hang.
    """

    def __init__(
        self, run_dir: Path, groups: Groups, cfg: config.Config, beat: Callable[[], object] = lambda: None
    ) -> None:
        self.run_dir, self.groups, self.cfg, self.beat = run_dir, groups, cfg, beat
        self._moved = 0  # bytes, of all checkpoints
        self.timeout = min(cfg.faults.hang_seconds / 2 or SIDECARS_SECONDS, SIDECARS_SECONDS)
        self._staging = Staging()
        self._copied = threading.Event()  # training may change its tensors
        self._copied.set()
        self._thread: threading.Thread | None = None
        self._outcome: Written | BaseException | None = None  # of the thread, read when it has ended
        self._finished: list[Written] = []
        self._failure: BaseException | None = None

    def reserve(self, engine: Engine) -> None:
        """Take the memory for the copy now: where there is too little, a run should not learn it hours later.

        Raises UserError then.
        """
        if self.cfg.checkpoint.asynchronous:
            self._staging.reserve(share_of(engine, self.cfg.model, self.groups).tensors)

    def save(self, step: int, engine: Engine, facts: dict[str, Any]) -> float:
        """Write a checkpoint of `step`; returns for how many seconds the training loop stood still. Collective.

        `facts` are stored beside the step: samples, rows_per_step, data, ... With checkpoint.asynchronous the copy is
        complete after `settle`, which has to be called before anything changes the engine's weights, moments or
        buffers, and `poll` tells when it is written. Otherwise it is published when this returns.

        Raises UserError, on every rank, when the disk has too little room, or when a write before failed on any of
        them; what was published before is then untouched.
        """
        begun = time.perf_counter()
        self._join()
        share = share_of(engine, self.cfg.model, self.groups)
        self._prepare(step, share.bytes)
        asynchronous = self.cfg.checkpoint.asynchronous
        later: Sequence[Tensor] = []
        buffers: Iterable[memoryview] = []
        if not asynchronous:
            buffers = map(as_bytes, share.tensors)
        elif any(tensor.is_cuda for tensor in share.tensors):
            # At once: it takes little time by way of pinned memory, and a thread would need a stream of its own that
            # waits for the step before, and that the step after waits for.
            buffers = self._staging.copy(share.tensors)
        else:
            later = share.tensors
        job = Job(step, share.vectors, later, buffers, share.parts, self._manifest(step, facts), begun)
        if asynchronous:
            if later:
                self._copied.clear()
            # Nobody waits for it at exit: a process that fails should end, and half a checkpoint does no harm.
            self._thread = threading.Thread(target=self._work, args=(job,), name=f"checkpoint-{step}", daemon=True)
            self._thread.start()
        else:
            self._work(job)
            self._collect()
            self._agree()
        return time.perf_counter() - begun

    def settle(self) -> float:
        """Wait until the last `save` no longer needs the engine's tensors; returns for how many seconds.

        An error of the copy shows in `poll`, `wait` or the next `save`, as those of the write do.
        """
        begun = time.perf_counter()
        self._copied.wait()
        return time.perf_counter() - begun

    def poll(self) -> list[Written]:
        """What was finished since the last call. Raises UserError when a write of this rank failed (once)."""
        if self._thread is not None and not self._thread.is_alive():
            self._join()
        self._raise_failure()
        finished, self._finished = self._finished, []
        return finished

    def wait(self) -> None:
        """Until this process writes nothing any more. Raises UserError when a write of this rank failed (once)."""
        self._join()
        self._raise_failure()

    def _count(self, size: int) -> None:
        self._moved += size
        if self._thread is None:  # the caller itself writes
            self.beat()

    def _join(self) -> None:
        if self._thread is not None:
            moved = -1
            while self._thread.is_alive():
                if self._moved != moved:
                    moved = self._moved
                    self.beat()
                self._thread.join(BEAT_SECONDS)
            self._thread = None
            self._collect()

    def _collect(self) -> None:
        outcome, self._outcome = self._outcome, None
        if isinstance(outcome, Written):
            self._finished.append(outcome)
        else:
            self._failure = outcome

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _agree(self, trouble: str | None = None) -> None:
        """Raise on every rank what any of them met, rank 0's `trouble` first. Collective."""
        reports = self.groups.gather(trouble or (self._failure and str(self._failure)))
        if not isinstance(self._failure, UserError):
            self._raise_failure()  # a defect of ours keeps its traceback
        self._failure = None
        for report in reports:
            if report:
                raise UserError(report)

    def _prepare(self, step: int, size: int) -> None:
        """An empty folder to write to, unless something failed before or there is no room. Collective."""
        self._agree()
        needed = sum(self.groups.gather(size)) + SPARE_BYTES
        trouble = None
        if self.groups.is_main:
            partial = partial_of(self.run_dir, step)
            try:
                root_of(self.run_dir).mkdir(parents=True, exist_ok=True)
                sweep(self.run_dir)
                free = shutil.disk_usage(root_of(self.run_dir)).free
                if free < needed:
                    trouble = (
                        f"cannot write checkpoint {partial}: it needs {in_words(needed)}, and {in_words(free)} of the"
                        f" disk are free; remove something or lower checkpoint.keep"
                        f" ({self.cfg.checkpoint.keep}); the checkpoints before are untouched"
                    )
                else:
                    remove(partial)  # what of it could not be swept away (files in use on NFS) goes aside
                    partial.mkdir()
            except OSError as error:
                trouble = str(_write_error(partial, error))
        self._agree(trouble)

    def _manifest(self, step: int, facts: dict[str, Any]) -> dict[str, Any]:
        place, parallel = self.groups.place, self.cfg.parallel
        deepspeed = uses_deepspeed(parallel, self.groups.world)
        layout = {
            "world": self.groups.world,
            "engine": "deepspeed" if deepspeed else "plain",
            "expert_parallel": place.ep_size,
            "tensor_parallel": place.tp_size,
            "zero_stage": parallel.zero_stage if deepspeed else 0,
        }
        written = datetime.now(UTC).isoformat(timespec="seconds")
        values = {"format": FORMAT, "step": step, "written": written, "layout": layout, "kinds": KINDS}
        return facts | values | {"config": asdict(self.cfg)}

    # --- in the thread --------------------------------------------------------------------------------------------

    def _work(self, job: Job) -> None:
        try:
            if job.tensors:
                try:
                    job = job._replace(tensors=[], buffers=self._staging.copy(job.tensors))
                finally:
                    self._copied.set()
            self._outcome = self._write(job)
        except BaseException as error:
            self._outcome = error

    def _write(self, job: Job) -> Written:
        partial = partial_of(self.run_dir, job.step)
        path = partial / f"rank-{self.groups.rank:05d}.safetensors"
        failure = None
        try:
            sha256, size = files.write(path, files.header(job.vectors), job.buffers, self._count)
            parts = [part.to_json() for part in job.parts]
            _report(path, {"file": path.name, "sha256": sha256, "bytes": size, "parts": parts})
        except OSError as error:
            failure, size = _write_error(path, error), 0
            with contextlib.suppress(OSError):
                path.unlink(missing_ok=True)  # room for the report
                _report(path, {"error": str(failure)})
        if self.groups.is_main:
            return self._finish(job, partial, failure)
        if failure:
            raise failure
        return Written(job.step, time.perf_counter() - job.begun, size, partial.with_suffix(""))

    def _finish(self, job: Job, partial: Path, failure: UserError | None) -> Written:
        """Rank 0: wait for the other ranks, and publish. Raises UserError; nothing of the folder is left then."""
        try:
            reports = self._reports(partial, failure)
            digest = write_manifest(partial, job.manifest | {"files": reports})
            for path in partial.glob("rank-*.json"):
                path.unlink()
            size = open_checkpoint(partial, self.cfg).bytes
            sync(partial)
            final = publish(partial, digest)
        except OSError as error:
            shutil.rmtree(partial, ignore_errors=True)
            raise _write_error(partial, error) from None
        except UserError:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        keep, evaluations = self.cfg.checkpoint, self.cfg.evaluate.every
        if evaluations and job.step % evaluations == 0:  # mm_train.evaluations reads it, and lets it go
            with contextlib.suppress(OSError):
                hold(final)
        prune(self.run_dir, job.step, keep.keep, keep.keep_every, self.cfg.decay_from)
        return Written(job.step, time.perf_counter() - job.begun, size, final)

    def _reports(self, partial: Path, failure: UserError | None) -> list[dict[str, Any]]:
        """The sidecars of all ranks, in their order.

        Raises UserError for a rank that failed (`failure`: this one) or does not finish in time. It waits a while for
        the others even so: the folder is theirs as well until they have finished.
        """
        now = time.monotonic()
        deadline, pause = now + (min(AFTER_FAILURE_SECONDS, self.timeout) if failure else self.timeout), 0.01
        missing = set(range(1 if failure else 0, self.groups.world))
        reports: dict[int, dict[str, Any]] = {}
        while True:
            for rank in sorted(missing):
                path = partial / f"rank-{rank:05d}.json"
                if path.exists():
                    missing.remove(rank)
                    reports[rank] = json.loads(path.read_bytes())
                    if "error" in reports[rank] and failure is None:
                        failure = UserError(reports[rank]["error"])
                        deadline = min(deadline, time.monotonic() + AFTER_FAILURE_SECONDS)
            if not missing or time.monotonic() > deadline:
                break
            time.sleep(pause)
            pause = min(2 * pause, 1.0)
        if failure:
            raise failure
        if missing:
            ranks = f"rank{'s' if len(missing) > 1 else ''} {', '.join(map(str, sorted(missing)))}"
            raise UserError(
                f"cannot write checkpoint {partial}: {ranks} of {self.groups.world} did not finish within"
                f" {self.timeout:g} s; is the folder on a disk that all processes share?"
            )
        return [reports[rank] for rank in range(self.groups.world)]


def _report(path: Path, values: dict[str, Any]) -> None:
    """The sidecar of a rank's file."""
    write_atomic(path.with_suffix(".json"), json.dumps(values).encode())


def _write_error(path: Path, error: OSError) -> UserError:
    """What went wrong while writing `path`, in one sentence."""
    why = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        why += "; make room or lower checkpoint.keep; the checkpoints before are untouched"
    return UserError(f"cannot write checkpoint {path}: {why}")
