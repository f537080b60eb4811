"""Tensor parallelism with Megatron's layers: heads, shared expert and vocabulary cut over the ranks of a TP group.

Attention and MLP each send one all-reduce forward (after their last projection) and one backward (for their input,
which their first projections share). Routed experts and router are replicated: every rank of the group computes them on
the same tokens, with the same result. mm_train.sharding says which tensor is cut along which axis.
"""

from typing import Any

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.cross_entropy import CHUNK_ROWS, IGNORE
from mm_train.model import Attention, MobileMoE
from mm_train.moe import MLP
from mm_train.parallel.groups import Groups, import_megatron
from mm_train.quant import Embedding, Linear
from mm_train.sharding import CUT_BY_OUTPUT


def shard_tensors(model: MobileMoE, groups: Groups) -> None:
    """Replace the dense modules of an unfilled model by their tensor-parallel counterparts."""
    if groups.tp is None:
        return
    built = _classes(groups.place.tp_size)
    for path, module in list(model.named_modules()):
        parent, _, name = path.rpartition(".")
        if isinstance(module, Linear):
            kind = built["ColumnLinear"] if name in CUT_BY_OUTPUT else built["RowLinear"]
            outputs, inputs = module.weight.shape
            setattr(model.get_submodule(parent), name, kind(inputs, outputs, module.weight.device))
        elif isinstance(module, Embedding):
            setattr(
                model.get_submodule(parent), name, built["VocabEmbedding"](*module.weight.shape, module.weight.device)
            )
        elif type(module) is Attention or type(module) is MLP:
            module.__class__ = built[type(module).__name__]


def _classes(tp_size: int) -> dict[str, Any]:
    """Our modules as children of Megatron's. Made here because megatron-core is imported only where it is used."""
    layers = import_megatron("megatron.core.tensor_parallel.layers")
    mappings = import_megatron("megatron.core.tensor_parallel.mappings")
    vocab_parallel_cross_entropy = import_megatron(
        "megatron.core.tensor_parallel.cross_entropy"
    ).vocab_parallel_cross_entropy
    config = import_megatron("megatron.core.model_parallel_config").ModelParallelConfig(
        tensor_model_parallel_size=tp_size,
        use_cpu_initialization=True,  # weights appear where torch's default device says
        perform_initialization=False,  # mm_train.weights fills them
        gradient_accumulation_fusion=False,
    )
    common: dict[str, Any] = {"config": config, "init_method": None}

    class ColumnLinear(layers.ColumnParallelLinear):  # type: ignore[name-defined]
        """Outputs cut; the input's gradient is all-reduced once by the module around it."""

        def __init__(self, inputs: int, outputs: int, device: Any) -> None:
            with device:
                super().__init__(inputs, outputs, bias=False, disable_grad_reduce=True, **common)

        def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class RowLinear(layers.RowParallelLinear):  # type: ignore[name-defined]
        """Inputs cut; outputs are all-reduced."""

        def __init__(self, inputs: int, outputs: int, device: Any) -> None:
            with device:
                super().__init__(inputs, outputs, bias=False, input_is_parallel=True, skip_bias_add=False, **common)

        def _forward_impl(self, input: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return super()._forward_impl(input, weight.to(input.dtype), *args, **kwargs)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)[0]

    class VocabEmbedding(layers.VocabParallelEmbedding):  # type: ignore[name-defined]
        """Rows of the table cut, for the lookup and for the head tied to it; see mm_train.quant.Embedding."""

        def __init__(self, num_embeddings: int, width: int, device: Any) -> None:
            with device:
                super().__init__(num_embeddings, width, **common)

        def table(self) -> nn.Parameter:
            return self.weight

        def lookup(self, tokens: Tensor, table_VD: Tensor) -> Tensor:
            return self(tokens)

        def cross_entropy_sum(self, hidden_ND: Tensor, table_VD: Tensor, labels_N: Tensor) -> Tensor:
            """Chunk by chunk, each computed again in the backward pass: never all logits at once."""
            hidden_ND = mappings.copy_to_tensor_model_parallel_region(hidden_ND)
            total = hidden_ND.new_zeros((), dtype=table_VD.dtype)
            for hidden, labels in zip(hidden_ND.split(CHUNK_ROWS), labels_N.split(CHUNK_ROWS), strict=True):
                total = total + checkpoint(
                    _chunk_sum, hidden, table_VD, labels, use_reentrant=False, preserve_rng_state=False
                )
            return total

    def _chunk_sum(hidden: Tensor, table_VD: Tensor, labels: Tensor) -> Tensor:
        # Cast anew for every chunk, or the gradients of all chunks would be added up in 16 bits.
        losses = vocab_parallel_cross_entropy((hidden @ table_VD.to(hidden.dtype).T).float(), labels)
        return (losses * (labels != IGNORE)).sum()

    class TensorParallelAttention(Attention):
        """Attention of this rank's heads."""

        def forward(self, x_BTD: Tensor, *args: Any) -> Tensor:
            return super().forward(mappings.copy_to_tensor_model_parallel_region(x_BTD), *args)

    class TensorParallelMLP(MLP):
        """An MLP over this rank's part of its width."""

        def forward(self, x_TD: Tensor) -> Tensor:
            return super().forward(mappings.copy_to_tensor_model_parallel_region(x_TD))

    return {
        "ColumnLinear": ColumnLinear,
        "RowLinear": RowLinear,
        "VocabEmbedding": VocabEmbedding,
        "Attention": TensorParallelAttention,
        "MLP": TensorParallelMLP,
    }
