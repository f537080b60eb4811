"""Several processes that share an evaluation: who is who, and what one has to tell the others.

Started by torchrun, or by launch/local.sh N -m eval.run ..., which set RANK, WORLD_SIZE and where rank 0 listens.
"""

import datetime
import os
from typing import Any

import torch
import torch.distributed as dist


class Ranks:
    """This process among `world`; alone without RANK and WORLD_SIZE in the environment."""

    def __init__(self) -> None:
        self.rank = int(os.environ.get("RANK", 0))
        self.world = int(os.environ.get("WORLD_SIZE", 1))
        self.local = int(os.environ.get("LOCAL_RANK", self.rank))
        if self.world > 1:
            # Ranks wait for the slowest at the end of each benchmark; the launcher ends them when one dies.
            dist.init_process_group("gloo", timeout=datetime.timedelta(days=1))

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes results."""
        return self.rank == 0

    def device(self) -> str:
        """Where this rank's model goes."""
        if not torch.cuda.is_available():
            return "cpu"
        return f"cuda:{self.local % torch.cuda.device_count()}"

    def gather(self, value: Any) -> list[Any]:
        """What every rank says, by rank."""
        if self.world == 1:
            return [value]
        found: list[Any] = [None] * self.world
        dist.all_gather_object(found, value)
        return found

    def close(self) -> None:
        """Leave the others, after all have come here."""
        if self.world > 1:
            dist.barrier()
            dist.destroy_process_group()
