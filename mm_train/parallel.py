"""Expert and data parallelism: process groups, sharded experts and the DeepSpeed engine, applied to a finished model.

World = expert_parallel (EP) x expert data parallel. Ranks of an EP group hold different experts; the dense part is
data-parallel over the whole world. The only file that imports deepspeed. It leans on private names of
deepspeed 0.19.8, which is therefore pinned; what it needs of them is noted where it is used.
"""

import datetime
import logging
import os
import warnings
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor, nn

from mm_train import config
from mm_train.cli import UserError
from mm_train.data import Batch
from mm_train.engine import MOMENTS, Engine, PlainEngine, materialise_moments, set_learning_rate, set_step
from mm_train.model import Losses, MobileMoE
from mm_train.moe import MoELayer
from mm_train.optim import adamw, parameter_groups


@dataclass
class Groups:
    """This process's place in the world. `ep` is None where every rank holds all experts."""

    rank: int = 0
    world: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    ep: dist.ProcessGroup | None = None
    ep_rank: int = 0
    ep_size: int = 1
    expert_dp_rank: int = 0

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def local_experts(self, num_experts: int) -> range:
        """Global ids of the experts that live here."""
        local = num_experts // self.ep_size
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)

    def sum(self, value: Tensor) -> Tensor:
        """Sum over all ranks, in place."""
        if self.world > 1:
            dist.all_reduce(value)
        return value

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()

    def close(self) -> None:
        """Leave the process group."""
        if dist.is_initialized():
            dist.destroy_process_group()


def init_groups(parallel: config.Parallel) -> Groups:
    """Join the world and form the expert-parallel groups.

    RANK, WORLD_SIZE, LOCAL_RANK and MASTER_* describe the world; torchrun and launch/local.sh set them. Raises
    UserError when the world does not fit the layout or the machine, or DeepSpeed is wanted and not installed.
    """
    world, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world % parallel.expert_parallel:
        raise UserError(
            f"parallel.expert_parallel ({parallel.expert_parallel}) must divide the number of processes ({world})"
        )
    if world > 1 and parallel.engine == "plain":
        raise UserError(f"parallel.engine=plain runs on one process; there are {world}: use deepspeed or auto")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", "0"))
        if local_rank >= torch.cuda.device_count():
            raise UserError(
                f"process {local_rank} of this machine has no GPU of its own ({torch.cuda.device_count()} visible):"
                " start as many processes as GPUs, or set CUDA_VISIBLE_DEVICES= to train on the CPU"
            )
        device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if not uses_deepspeed(parallel, world):
        return Groups(device=device)

    deepspeed = _import_deepspeed()
    if world == 1:
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
        os.environ.setdefault("MASTER_PORT", "29500")
    backend = "nccl" if device.type == "cuda" else "gloo"
    deepspeed.init_distributed(backend, auto_mpi_discovery=False, verbose=False, timeout=datetime.timedelta(minutes=10))
    ep_size = parallel.expert_parallel
    if ep_size == 1:  # experts are then ordinary data-parallel parameters
        return Groups(rank, world, device, expert_dp_rank=rank)
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    return Groups(
        rank,
        world,
        device,
        groups._get_expert_parallel_group(name),
        groups._get_expert_parallel_rank(name),
        ep_size,
        groups._get_expert_data_parallel_rank(name),
    )


def uses_deepspeed(parallel: config.Parallel, world: int) -> bool:
    return parallel.engine == "deepspeed" or (parallel.engine == "auto" and world > 1)


def _import_deepspeed():
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


def shard_experts(model: MobileMoE, groups: Groups) -> None:
    """Keep only this rank's experts, mark them for DeepSpeed, and let every layer dispatch over the EP group."""
    if groups.ep is None:
        return
    mine = groups.local_experts(model.config.num_local_experts)
    expert_parallel_class = _expert_parallel_layer()
    for layer in model.moe_layers():
        for name, whole in list(layer.experts.named_parameters()):
            local = nn.Parameter(whole.data[mine.start : mine.stop].clone())
            vars(local).update(  # DeepSpeed: reduce over the expert-data-parallel group only
                allreduce=False, group_name=f"ep_size_{groups.ep_size}"
            )
            setattr(layer.experts, name, local)
        layer.dispatcher.group, layer.dispatcher.ranks = groups.ep, groups.ep_size
        layer.__class__ = expert_parallel_class
        vars(layer).update(  # what the engine reads of deepspeed's MoE; its own gate and experts are never made
            num_experts=model.config.num_local_experts,
            num_local_experts=len(mine),
            ep_size=groups.ep_size,
            expert_group_name=f"ep_size_{groups.ep_size}",
        )


def _expert_parallel_layer() -> type:
    """Our layer as DeepSpeed knows one: the engine looks for isinstance(module, deepspeed.moe.layer.MoE)."""
    from deepspeed.moe.layer import MoE

    class ExpertParallelMoE(MoELayer, MoE):
        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already (init_groups)."""

    return ExpertParallelMoE


def build_engine(model: MobileMoE, cfg: config.Config, groups: Groups) -> Engine:
    """Optimizer and gradient handling for `model`: DeepSpeed's engine, or plain PyTorch on one process."""
    if uses_deepspeed(cfg.parallel, groups.world):
        return DeepSpeedEngine(model, cfg, groups)
    return PlainEngine(model, cfg.optim)


class DeepSpeedEngine:
    """deepspeed.initialize around the model: ZeRO, gradient reduction over the right groups, global clipping."""

    def __init__(self, model: MobileMoE, cfg: config.Config, groups: Groups) -> None:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        micro_steps = cfg.micro_steps(groups.world)
        self.loss_scale = float(groups.world * micro_steps)
        self.model = model
        param_groups = parameter_groups(model, cfg.optim)
        if groups.ep is not None:
            param_groups = [
                g for g in split_params_into_different_moe_groups_for_optimizer(param_groups) if g["params"]
            ]
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=adamw(param_groups, cfg.optim),
            config={
                "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
                "gradient_accumulation_steps": micro_steps,
                "train_batch_size": cfg.train.micro_batch_size * micro_steps * groups.world,
                "gradient_clipping": cfg.optim.clip_grad_norm,
                "zero_optimization": {"stage": cfg.parallel.zero_stage},
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 60,
            },
        )
        self.adam = self.optimizer.optimizer  # what ZeRO wraps
        materialise_moments(self.adam)
        self._link_moments()

    def _link_moments(self) -> None:
        """Let DeepSpeed find each parameter's slice of the moments, which it otherwise does in the first step only."""
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()

    def forward(self, batch: Batch) -> Losses:
        return self.engine(batch.tokens_BT, batch.labels_BT, batch.document_BT)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-step; the update itself waits for `step` below

    def step(self, learning_rate: float) -> Tensor | float:
        set_learning_rate(self.adam, learning_rate)
        self.engine.step()
        return self.engine.get_global_grad_norm()

    def moments(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        from deepspeed.utils import safe_get_full_optimizer_state

        return {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}

    def restore(self, parameter: nn.Parameter, value: Tensor, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        parameter.data.copy_(value)  # the working copy; the master partition below
        safe_set_full_fp32_param(parameter, value)
        for key, moment in moments.items():
            safe_set_full_optimizer_state(parameter, moment, key)

    def restore_step(self, step: int) -> None:
        set_step(self.adam, step)
