"""What SLURM starts as a rank: gives it its place, its log and its end a record. Only the standard library.

    srun python -m launch.slurm_rank FOLDER START COMMAND ...

FOLDER/ranks/rank-00003.log gets what the command prints, every start after the one before. How it ended is written to
FOLDER/ends/START/rank-00003.json: srun and torchrun only tell that something did. They see 0 for a rank that stopped on
request, so that nobody ends the others, which are still busy with it.

A rank that is there before torch is imported ignores signals; mm_train.train takes them when it is ready for them.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Any

from mm_train.files import write_atomic
from mm_train.stopping import SIGNALS, STOPPED
from mm_train.watchdog import HUNG

OTHERS_SECONDS = 6.0  # for other ranks that hang to find it out and write their stacks, before srun ends them
OF_SLURM = {"RANK": "SLURM_PROCID", "LOCAL_RANK": "SLURM_LOCALID", "WORLD_SIZE": "SLURM_NTASKS"}


def main(argv: list[str]) -> int:
    folder, start, command = Path(argv[0]), argv[1], argv[2:]
    environment = dict(os.environ)
    if "TORCHELASTIC_RUN_ID" not in environment:  # torchrun has said it already
        environment |= {name: environment[of_slurm] for name, of_slurm in OF_SLURM.items()}
        environment["LOCAL_WORLD_SIZE"] = environment["SLURM_STEP_TASKS_PER_NODE"].split("(")[0].split(",")[0]
    if scratch := os.path.expandvars(environment.get("MM_SCRATCH", "")):
        environment = {"TMPDIR": scratch, "TRITON_CACHE_DIR": f"{scratch}/triton"} | environment
    rank, node = int(environment["RANK"]), environment.get("SLURMD_NODENAME", "?")
    child: list[subprocess.Popen] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        for process in child:
            process.send_signal(number)

    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)  # what is ignored stays so in the new process, until it says otherwise
    log = open_log(folder, rank)
    head = f"=== job {start.replace('-', ', start ')} rank {rank} on {node}, {time.strftime('%Y-%m-%dT%H:%M:%S')}\n"
    os.write(log, head.encode())
    began = os.fstat(log).st_size
    child.append(subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log))
    for number in SIGNALS:
        signal.signal(number, pass_on)
    code = child[0].wait()
    status = code if code >= 0 else 128 - code
    end = {"rank": rank, "node": node, "status": status, "time": time.time(), "log_offset": began}
    write_end(folder, start, end)
    if status == HUNG:
        time.sleep(OTHERS_SECONDS)
    return 0 if status == STOPPED else status


def open_log(folder: Path, rank: int) -> int:
    """Descriptor of the rank's log, at its end. (Not a file object: two processes write to it.)"""
    return os.open(log_file(folder, rank), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)


def log_file(folder: Path, rank: int) -> Path:
    return folder / "ranks" / f"rank-{rank:05d}.log"


def write_end(folder: Path, start: str, end: dict[str, Any]) -> None:
    """A file that cannot be written is no reason to change the status."""
    path = folder / "ends" / start / f"rank-{end['rank']:05d}.json"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(end).encode())
    except OSError as error:
        print(f"rank {end['rank']}: cannot write {path}: {error.strerror}", file=sys.stderr, flush=True)


def read_ends(folder: Path, start: str) -> list[dict[str, Any]]:
    """How the ranks of a start ended, as far as they could say it."""
    ends = []
    for path in sorted((folder / "ends" / start).glob("rank-*.json")):
        try:
            ends.append(json.loads(path.read_text()))
        except (OSError, ValueError):
            continue
    return ends


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
