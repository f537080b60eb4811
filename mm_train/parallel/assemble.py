"""A model as one rank trains it: built without values, cut to this rank's part, given memory."""

import torch

from mm_train import config
from mm_train.model import MobileMoE
from mm_train.parallel.experts import shard_experts
from mm_train.parallel.groups import Groups
from mm_train.parallel.tensors import shard_tensors
from mm_train.quant import FakeQuant, enable_fake_quant
from mm_train.weights import materialise


def assemble(cfg: config.Config, groups: Groups) -> MobileMoE:
    """The network of `cfg` on this rank in training mode, its values still to be filled (mm_train.weights)."""
    with torch.device("meta"):
        model = MobileMoE(cfg.model, getattr(torch, cfg.train.dtype))
    shard_tensors(model, groups)
    shard_experts(model, groups)
    materialise(model, groups.device)
    model.recompute = cfg.train.recompute == "layer"
    if cfg.moe.dispatch == "drop_and_pad":
        for layer in model.moe_layers():
            layer.dispatcher.capacity_factor = cfg.moe.capacity_factor
    if cfg.quant.enabled:
        enable_fake_quant(model, FakeQuant.of(cfg.quant))
    return model.train()
