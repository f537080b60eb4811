"""Process groups: who holds the same tensors, who shares them out, who adds up what.

World = tensor parallel (TP) x data parallel (DP), ranks of a TP group next to each other; data parallel = expert
parallel (EP) x replicas. Ranks of an EP group lie in one TP lane and hold different experts; those of a TP group hold
different parts of the dense tensors and read the same batches.
"""

import datetime
import importlib
import logging
import os
import warnings
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mm_train import config
from mm_train.cli import LostContact, UserError, first_line
from mm_train.rules import check_world
from mm_train.sharding import ALONE, Place

LONGER_SECONDS = 600.0  # beyond faults.hang_seconds that a collective waits: the watchdog says more


@dataclass
class Groups:
    """This process's place in the world. A group is None where this process is alone in it."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    place: Place = ALONE
    dp_rank: int = 0
    dp_size: int = 1
    ep: dist.ProcessGroup | None = None
    tp: dist.ProcessGroup | None = None
    dp: dist.ProcessGroup | None = None  # ranks of this TP lane, which together read each sample once
    mpu: Any = None  # megatron's groups as DeepSpeed asks for them; None without tensor parallelism

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def expert_dp(self) -> tuple[int, int]:
        """(rank, size) among those with the same experts in this TP lane."""
        return self.dp_rank // self.place.ep_size, self.dp_size // self.place.ep_size

    def sum(self, value: Tensor) -> Tensor:
        """Sum over data-parallel ranks, in place: every token of the global batch counts once."""
        if self.dp_size > 1:
            dist.all_reduce(value, group=self.dp)
        return value

    def total(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def gather(self, value: Any) -> list[Any]:
        """Every rank's small object, in order of rank, on every rank."""
        values = [value] * self.world
        if self.world > 1:
            dist.all_gather_object(values, value)
        return values

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init_groups(parallel: config.Parallel, hang_seconds: float = 0) -> Groups:
    """Join the world and form its groups.

    `hang_seconds` is how long the watchdog waits (mm_train.watchdog; 0: for ever); collectives wait longer.
    RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe the world; torchrun, launch/local.sh and launch/slurm_rank.py set
    them. Raises UserError when the world does not fit the layout or the machine, or a package that is wanted is not
    installed, and LostContact when the other ranks cannot be reached.
    """
    world, rank = (_number(name, default) for name, default in (("WORLD_SIZE", 1), ("RANK", 0)))
    check_world(parallel, world)
    device = _device()
    if not uses_deepspeed(parallel, world):
        return Groups(device=device)

    deepspeed = import_deepspeed()
    if world == 1:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", "29500")
    if not dist.is_initialized():
        backend = "nccl" if device.type == "cuda" else "gloo"
        try:
            deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False)
        except dist.DistError as error:
            where = ":".join(os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
            what = f"rank {rank} cannot join the other {world - 1} at {where}: {first_line(error)}"
            raise LostContact(what) from None  # a node that does not answer, more often than a wrong address
    groups = form_groups(parallel, rank, world, device)
    if groups.mpu is None:
        importlib.import_module("deepspeed.utils.groups")._clone_world_group()  # ZeRO's, otherwise made later
    timeout = datetime.timedelta(seconds=hang_seconds + LONGER_SECONDS) if hang_seconds else datetime.timedelta(days=30)
    for group in dist.distributed_c10d._world.pg_map:  # all there are: deepspeed and megatron make their own
        dist.distributed_c10d._set_pg_timeout(timeout, group)
    return groups


def form_groups(parallel: config.Parallel, rank: int, world: int, device: torch.device) -> Groups:
    """The groups of a layout in a world that has been joined. Collective."""
    from deepspeed.utils import groups as deepspeed_groups

    tp_size, ep_size = parallel.tensor_parallel, parallel.expert_parallel
    dp_size = world // tp_size
    dp_rank, tp_rank = divmod(rank, tp_size)
    formed = Groups(rank, world, device, Place(0, ep_size, tp_rank, tp_size), dp_rank, dp_size)
    if tp_size > 1:
        state = import_megatron("megatron.core.parallel_state")
        state.initialize_model_parallel(tensor_model_parallel_size=tp_size)
        formed.tp, formed.dp = state.get_tensor_model_parallel_group(), state.get_data_parallel_group()
        formed.mpu = deepspeed_groups.mpu = _Mpu(state)
    if ep_size > 1:  # otherwise experts are ordinary data-parallel parameters
        if tp_size > 1:
            deepspeed_groups._create_expert_data_and_model_parallel(ep_size, mpu=formed.mpu)
        else:
            deepspeed_groups._create_expert_and_data_parallel(ep_size)
        formed.ep = deepspeed_groups._get_expert_parallel_group(f"ep_size_{ep_size}")
        formed.place = formed.place._replace(ep_rank=dist.get_rank(formed.ep))
        assert formed.place.ep_rank == dp_rank % ep_size, "deepspeed lays out expert-parallel groups differently"
    return formed


class _Mpu:
    """megatron.core.parallel_state with the three older names that DeepSpeed asks for as well."""

    def __init__(self, state: Any) -> None:
        self._state = state
        self.get_model_parallel_rank = state.get_tensor_model_parallel_rank
        self.get_model_parallel_world_size = state.get_tensor_model_parallel_world_size
        self.get_model_parallel_group = state.get_tensor_model_parallel_group

    def __getattr__(self, name: str) -> Any:
        return getattr(self._state, name)


def lost_contact(error: RuntimeError) -> bool:
    """Did a collective fail because another rank is gone, rather than for a fault of its own?"""
    return isinstance(error, dist.DistError) or any(
        sign in str(error) for sign in ("gloo/", "Connection closed by peer")
    )


def uses_deepspeed(parallel: config.Parallel, world: int) -> bool:
    """Does this layout need DeepSpeed's engine?"""
    return parallel.engine == "deepspeed" or (parallel.engine == "auto" and world > 1)


def import_deepspeed() -> Any:
    """The package, quiet and without what it would compile. Raises UserError when it is not installed."""
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
    os.environ.setdefault("DEEPSPEED_LOG_LEVEL", "warning")
    try:
        import deepspeed
    except ImportError:
        raise UserError(
            "more than one process needs DeepSpeed, which is not installed: pip install 'mobilemoe-train[distributed]'"
        ) from None
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # deepspeed 0.19.8 calls collectives by names that torch 2.13 renamed.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # Without this the CPU path compiles a C++ extension at start (minutes, and a compiler).
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed


def import_megatron(module: str) -> Any:
    """A module of megatron-core, without its advice on packages for GPUs. Raises UserError when it is not installed."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return importlib.import_module(module)
        except ImportError:
            raise UserError(
                "parallel.tensor_parallel needs megatron-core, which is not installed:"
                " pip install 'mobilemoe-train[distributed]'"
            ) from None


def _device() -> torch.device:
    """This process's GPU, or the CPU. Raises UserError when GPUs are fewer than processes."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local_rank = _number("LOCAL_RANK", 0)
    if local_rank >= torch.cuda.device_count():
        raise UserError(
            f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} visible):"
            " start as many processes as GPUs, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def _number(name: str, default: int) -> int:
    """A whole number of the environment. Raises UserError for anything else."""
    value = os.environ.get(name, str(default))
    if not value.isdecimal():
        raise UserError(f"{name} in the environment is {value!r}; it must be a whole number, as torchrun sets it")
    return int(value)
