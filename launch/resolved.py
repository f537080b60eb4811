"""What a launcher has to know of a run before it starts it, as one line of JSON. Torch-free.

    python -m launch.resolved WORLD COPY FILE.yaml ... key=value ...

Checks the words as mm_train.train would with WORLD processes, and writes the resolved configuration to the name COPY in
RUN/slurm, unless it is there. Where the interpreter with the packages is in a container, a batch script on the host
cannot do it itself.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from mm_train import config
from mm_train.cli import UserError, command
from mm_train.files import is_folder, writing
from mm_train.rules import check_world


@command
def main(argv: Sequence[str] | None = None) -> int:
    world, copy, *words = sys.argv[1:] if argv is None else argv
    cfg = config.load_words(words)
    check_world(cfg.parallel, int(world))
    cfg.micro_steps(int(world))
    if "://" not in cfg.data.path and not is_folder(Path(cfg.data.path)):
        raise UserError(f"data.path {cfg.data.path}: no such folder on this node")
    folder = Path(cfg.run.dir).absolute() / "slurm"
    with writing(folder):
        for name in ("ranks", "ends"):
            (folder / name).mkdir(parents=True, exist_ok=True)
    if not (folder / copy).exists():  # a job that is started again goes on with what it began with
        config.save(cfg, folder / copy)
    print(json.dumps({"run_dir": str(folder.parent), "hang_seconds": cfg.faults.hang_seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
