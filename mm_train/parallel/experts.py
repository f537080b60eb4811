"""Expert parallelism: each rank keeps its routed experts, and every layer dispatches over the group."""

import torch
from torch import nn

from mm_train.model import MobileMoE
from mm_train.moe import MoELayer
from mm_train.parallel.groups import Groups


def shard_experts(model: MobileMoE, groups: Groups) -> None:
    """Replace the experts of an unfilled model by this rank's, marked for DeepSpeed, and connect the dispatchers."""
    if groups.ep is None:
        return
    ep_size = groups.place.ep_size
    local = model.config.num_local_experts // ep_size
    expert_parallel_class = _expert_parallel_layer()
    for layer in model.moe_layers():
        for name, whole in list(layer.experts.named_parameters()):
            parameter = nn.Parameter(torch.empty(local, *whole.shape[1:], device=whole.device))
            vars(parameter).update(  # DeepSpeed: reduce over the ranks with the same experts only
                allreduce=False, group_name=f"ep_size_{ep_size}"
            )
            setattr(layer.experts, name, parameter)
        layer.dispatcher.group, layer.dispatcher.ranks = groups.ep, ep_size
        layer.__class__ = expert_parallel_class
        vars(layer).update(  # what the engine reads of deepspeed's MoE; its own gate and experts are never made
            num_experts=model.config.num_local_experts,
            num_local_experts=local,
            ep_size=ep_size,
            expert_group_name=f"ep_size_{ep_size}",
            enable_expert_tensor_parallelism=True,  # an expert-parallel group stays inside one tensor-parallel lane
        )


def _expert_parallel_layer() -> type:
    """Our layer as DeepSpeed knows one: the engine looks for isinstance(module, deepspeed.moe.layer.MoE)."""
    from deepspeed.moe.layer import MoE

    class ExpertParallelMoE(MoELayer, MoE):
        def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
            """The groups exist already (mm_train.parallel.groups)."""

    return ExpertParallelMoE
