"""DeepSpeed's engine around the model: gradients reduced over the right groups, ZeRO 0, 1 and 2.

Norm and clipping are ours (mm_train.optim), over the fragments that each rank answers for: deepspeed 0.19.8 clips
wrongly over experts in ZeRO 0.
"""

from typing import Any

import torch
from torch import Tensor

from mm_train import config, inventory
from mm_train.data import Batch
from mm_train.engine import (
    Engine,
    Fragment,
    PlainEngine,
    ReadRange,
    WholeState,
    materialise_moments,
    set_learning_rate,
    set_step,
)
from mm_train.model import Losses, MobileMoE
from mm_train.muon import MuonAdamW
from mm_train.optim import make_optimizer, parameter_groups
from mm_train.optim_groups import kinds_of
from mm_train.parallel.groups import Groups, uses_deepspeed
from mm_train.parallel.matrices import gather_over, lay_out_partitions
from mm_train.sharding import tensor_parallel_axis


def build_engine(model: MobileMoE, cfg: config.Config, groups: Groups) -> Engine:
    """Optimizer and gradient handling for `model`: DeepSpeed's engine, or plain PyTorch on one process."""
    if not uses_deepspeed(cfg.parallel, groups.world):
        return PlainEngine(model, cfg.optim)
    return (ReplicatedEngine if cfg.parallel.zero_stage == 0 else ZeroEngine)(model, cfg, groups)


class DeepSpeedEngine:
    """What both kinds share. Every rank answers for an equal part of what it holds together with others."""

    adam: torch.optim.AdamW  # torch's or ours over it, which moves the weights

    def __init__(self, model: MobileMoE, cfg: config.Config, groups: Groups) -> None:
        import deepspeed
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        micro_steps = cfg.micro_steps(groups.world)
        self.loss_scale = float(groups.dp_size * micro_steps)
        self.model, self.groups = model, groups
        self.parameters = dict(model.named_parameters())
        param_groups = parameter_groups(model, cfg.optim)
        if groups.ep is not None:
            param_groups = [
                g for g in split_params_into_different_moe_groups_for_optimizer(param_groups) if g["params"]
            ]
        zero = {"stage": cfg.parallel.zero_stage}
        if cfg.parallel.zero_stage:
            zero["compute_grad_norm"] = False
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=model,
            optimizer=make_optimizer(param_groups, cfg.optim, model.compute_dtype),
            mpu=groups.mpu,
            config={
                "train_micro_batch_size_per_gpu": cfg.train.micro_batch_size,
                "gradient_accumulation_steps": micro_steps,
                "train_batch_size": cfg.train.micro_batch_size * micro_steps * groups.dp_size,
                "gradient_clipping": 0.0,
                "zero_optimization": zero,
                "zero_allow_untested_optimizer": True,
                "steps_per_print": 1 << 60,
                "timers": {"throughput": {"enabled": False}},  # it waits for the GPU in every forward pass
            },
        )

    def forward(self, batch: Batch) -> Losses:
        return self.engine(batch.tokens_BT, batch.labels_BT, batch.document_BT, batch.lengths)

    def backward(self, loss: Tensor) -> None:
        self.engine.backward(loss)
        if not self.engine.is_gradient_accumulation_boundary():
            self.engine.step()  # counts the micro-step; the update itself waits for `step` below

    def step(self, learning_rate: float) -> None:
        set_learning_rate(self.adam, learning_rate)
        self.engine.step()

    def discard(self) -> None:
        self._clear_gradients()
        self.engine.micro_steps += 1  # engine.step() would have: the next forward begins a new accumulation

    def _clear_gradients(self) -> None:
        raise NotImplementedError

    def restore_step(self, step: int) -> None:
        set_step(self.adam, step)

    def _copies(self, entry: inventory.Entry) -> tuple[int, int]:
        """(number of this rank, how many) among the ranks that hold the same values of a tensor's optimizer state."""
        place = self.groups.place
        replicated = place.tp_size > 1 and tensor_parallel_axis(entry) is None
        tp_rank, tp_size = (place.tp_rank, place.tp_size) if replicated else (0, 1)
        dp_rank, dp_size = self._data_parallel_copies(entry)
        return dp_rank * tp_size + tp_rank, dp_size * tp_size

    def _data_parallel_copies(self, entry: inventory.Entry) -> tuple[int, int]:
        raise NotImplementedError

    def _held(self, name: str) -> tuple[int, int]:
        """Range of a parameter's local elements whose optimizer state this rank holds."""
        raise NotImplementedError

    def fragments(self) -> list[Fragment]:
        found = []
        for entry in inventory.tensors(self.model.config):
            if entry.name in self.parameters:
                start, stop = self._held(entry.name)
                number, copies = self._copies(entry)
                low, high = (start + (stop - start) * i // copies for i in (number, number + 1))
                if low < high:
                    found.append(Fragment(entry.name, low, high))
        return found


class ReplicatedEngine(WholeState, DeepSpeedEngine):
    """ZeRO 0: weights, gradients and moments whole on every rank that computes with them."""

    def __init__(self, model: MobileMoE, cfg: config.Config, groups: Groups) -> None:
        super().__init__(model, cfg, groups)
        self.adam = self.optimizer
        materialise_moments(self.adam)
        self.lay_out_matrices(model, cfg.optim, groups.place)
        if isinstance(self.adam, MuonAdamW) and groups.tp is not None:
            self.adam.gather = gather_over(groups)

    def _data_parallel_copies(self, entry: inventory.Entry) -> tuple[int, int]:
        return self.groups.expert_dp if entry.part == "routed experts" else (self.groups.dp_rank, self.groups.dp_size)

    def _held(self, name: str) -> tuple[int, int]:
        return 0, self.parameters[name].numel()

    def _clear_gradients(self) -> None:
        self.engine.zero_grad()


class ZeroEngine(DeepSpeedEngine):
    """ZeRO 1 and 2: each data-parallel rank holds a range of DeepSpeed's flat parameter groups."""

    def __init__(self, model: MobileMoE, cfg: config.Config, groups: Groups) -> None:
        super().__init__(model, cfg, groups)
        self.adam = self.optimizer.optimizer  # what ZeRO wraps
        self.optimizer.check_grad_overflow = False  # whether a step is taken is decided before `step` is called
        materialise_moments(self.adam)
        # Let DeepSpeed find each parameter's slice of the moments, which it otherwise does in the first step only.
        self.optimizer._hp_optimizer_states_linked = False
        self.optimizer._lazy_init_hp_params_optimizer_state()
        self.kinds = {entry.name: kinds_of(entry, cfg.optim) for entry in inventory.tensors(model.config)}
        if isinstance(self.adam, MuonAdamW):
            lay_out_partitions(self.adam, self.optimizer, model, cfg.optim, groups.place)
            if groups.tp is not None:
                self.adam.gather = gather_over(groups)

    def _mapping(self, name: str) -> Any:
        """DeepSpeed's record of the range of a parameter that lives here; None when it lives elsewhere."""
        return self.parameters[name]._hp_mapping  # type: ignore[attr-defined]

    def _data_parallel_copies(self, entry: inventory.Entry) -> tuple[int, int]:
        return 0, 1

    def _held(self, name: str) -> tuple[int, int]:
        mapping = self._mapping(name)
        if mapping is None:
            return 0, 0
        address = mapping.lp_fragment_address
        return address.start, address.start + address.numel

    def state(self, fragment: Fragment) -> dict[str, Tensor]:
        mapping, (offset, _) = self._mapping(fragment.name), self._held(fragment.name)
        moments = {key: mapping.get_hp_fragment(key) for key in self.kinds[fragment.name][1:]}
        tensors = {"weight": mapping.get_hp_fragment()} | moments
        return {k: t.view(-1)[fragment.start - offset : fragment.stop - offset] for k, t in tensors.items()}

    def gradient(self, fragment: Fragment) -> Tensor | None:
        parameter, (offset, _) = self.parameters[fragment.name], self._held(fragment.name)
        gradient = self._mapping(fragment.name).get_lp_grad_fragment(parameter._index_in_param_group)  # type: ignore[attr-defined]
        return gradient.reshape(-1)[fragment.start - offset : fragment.stop - offset]

    def scale_gradients(self, factor: float) -> None:
        for gradients in self.optimizer.averaged_gradients.values():
            torch._foreach_mul_(list(gradients), factor)

    def _clear_gradients(self) -> None:
        """What deepspeed does with gradients that overflowed."""
        self.optimizer.zero_grad(set_to_none=True)
        for group in self.optimizer.averaged_gradients:
            self.optimizer.averaged_gradients[group] = None
            self.optimizer.all_grad_tensors[group] = None

    @torch.no_grad()
    def restore(self, name: str, read: ReadRange) -> None:
        parameter, mapping = self.parameters[name], self._mapping(name)
        weight = read("weight", 0, parameter.numel())
        parameter.copy_(weight.view_as(parameter))
        if mapping is None:
            return
        start, stop = self._held(name)
        mapping.get_hp_fragment().copy_(weight[start:stop])
        for key in self.kinds[name][1:]:
            mapping.get_hp_fragment(key).copy_(read(key, start, stop))
