"""What a network costs: FLOPs, key-value cache, bytes between GPUs, days. Arithmetic only, torch-free.

Memory is in memory.py; describe.py prints both. Axes: T tokens of a row, N tokens of a micro-batch, L layers, H query
heads, G key-value heads, C head width, D model width, E experts, K experts a token, V vocabulary.
"""

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

from mm_train import inventory
from mm_train.config import Model
from mm_train.sharding import Box, Place, local_boxes

FLOAT = 4  # bytes of a float32: parameters, gradients, master weights and moments
REPLICATED = frozenset({"router", "routed experts"})  # parts that every GPU of a tensor-parallel group computes alike
SECONDS_PER_DAY = 86_400


@dataclass(frozen=True)
class Gpu:
    """What a vendor's data sheet promises."""

    name: str
    tflops: float  # peak of dense bf16 matmuls (sheets often print twice this, "with sparsity")
    memory_gib: float
    sheet: str


GPUS = {
    key: Gpu(name, tflops, memory, sheet)
    for key, name, tflops, memory, sheet in (
        ("a100-40", "NVIDIA A100 40GB", 312, 40, "NVIDIA A100 data sheet"),
        ("a100-80", "NVIDIA A100 80GB", 312, 80, "NVIDIA A100 data sheet"),
        ("l40s", "NVIDIA L40S", 362, 48, "NVIDIA L40S data sheet"),
        ("h100-pcie", "NVIDIA H100 PCIe", 756, 80, "NVIDIA H100 data sheet"),
        ("h100", "NVIDIA H100 SXM", 989, 80, "NVIDIA H100 data sheet"),
        ("h200", "NVIDIA H200 SXM", 989, 141, "NVIDIA H200 data sheet"),
        ("b200", "NVIDIA B200 (HGX)", 2250, 180, "NVIDIA HGX B200 data sheet"),
        ("mi300x", "AMD Instinct MI300X", 1307, 192, "AMD MI300X data sheet"),
        ("mi325x", "AMD Instinct MI325X", 1307, 256, "AMD MI325X data sheet"),
    )
}


@dataclass(frozen=True)
class Layout:
    """One way of training a network on `gpus` GPUs: what the estimates here and in memory.py depend on."""

    gpus: int = 1
    expert_parallel: int = 1
    zero_stage: int = 1
    micro_batch_size: int = 8  # rows
    context: int = 2048  # tokens of a row
    micro_steps: int = 1
    activation_bytes: int = 2  # of one value: 2 for bfloat16, 4 for float32
    capacity_factor: float | None = None  # drop-and-pad; None: dropless
    quantised: bool = False  # quantisation-aware training
    deepspeed: bool = False  # False: plain PyTorch on one process
    tensor_parallel: int = 1
    recompute: bool = False  # a layer keeps its input only (train.recompute=layer)
    muon: bool = False  # optim.name=muon

    @property
    def tokens(self) -> int:
        """N: tokens of a micro-batch of one GPU; those of a tensor-parallel group share it."""
        return self.micro_batch_size * self.context

    @property
    def data_parallel(self) -> int:
        """Micro-batches that are worked on at once: GPUs that share out the dense parameters' optimizer state."""
        return self.gpus // self.tensor_parallel

    @property
    def expert_data_parallel(self) -> int:
        """GPUs of a tensor-parallel lane that hold the same experts."""
        return self.data_parallel // self.expert_parallel

    @property
    def zero(self) -> int:
        """ZeRO stage in force: plain PyTorch has none."""
        return self.zero_stage if self.deepspeed else 0

    @property
    def place(self) -> Place:
        """A GPU's place among those that share out tensors: all hold equally much."""
        return Place(0, self.expert_parallel, 0, self.tensor_parallel)

    def expert_rows(self, model: Model) -> int:
        """Rows a micro-batch sends to the experts of a layer (mm_train.dispatch): N K, or E times the capacity."""
        slots = self.tokens * model.num_experts_per_tok
        if self.capacity_factor is None or not slots:
            return slots
        return model.num_local_experts * math.ceil(self.capacity_factor * slots / model.num_local_experts)


# --- FLOPs ------------------------------------------------------------------------------------------------------------


def matmul_parameters(model: Model) -> dict[str, int]:
    """Weights that multiply one token in the forward pass, by part.

    The tied embedding counts as the head; looking a row up is no matmul. Norms and the selection bias are none either.
    Of the routed experts those count that a token chooses.
    """
    matrices = inventory.active_parameters(model)
    for entry in inventory.tensors(model):
        if len(entry.shape) < 2:
            matrices[entry.part] -= entry.size
    names = {"embedding": "head", "attention": "attention projections"}
    return {names.get(part, part): count for part, count in matrices.items() if count}


def forward_flops(model: Model, context: int) -> dict[str, int]:
    """Forward FLOPs per token by part, averaged over a row of `context` tokens.

    2 for each weight of a matmul (multiply and add). Scores and values of attention: 2 x 2 H C for each token that is
    seen, which are T / 2 on average because attention is causal: 2 H C T a layer.
    """
    flops = {part: 2 * count for part, count in matmul_parameters(model).items()}
    heads_width = model.num_attention_heads * model.head_dim
    return flops | {"attention scores": 2 * heads_width * model.num_hidden_layers * context}


def train_flops(model: Model, context: int) -> dict[str, int]:
    """Training FLOPs per token by part: the backward pass makes two matmuls of each forward one, so 3 x forward."""
    return {part: 3 * flops for part, flops in forward_flops(model, context).items()}


def hardware_train_flops(model: Model, layout: Layout) -> float:
    """Training FLOPs per token that are really done, over all GPUs that work on it.

    Drop-and-pad computes its padding as well, every GPU of a tensor-parallel group the same router and routed experts,
    and recomputation the forward pass of the layers once more. MFU divides the model's FLOPs (train_flops) by the time,
    not these.
    """
    flops: dict[str, float] = dict(train_flops(model, layout.context))
    slots = layout.tokens * model.num_experts_per_tok
    if slots:
        flops["routed experts"] *= layout.expert_rows(model) / slots
    for part in REPLICATED & flops.keys():
        flops[part] *= layout.tensor_parallel
    again = sum(flops.values()) - flops["head"] if layout.recompute else 0
    return sum(flops.values()) + again / 3


# --- device -----------------------------------------------------------------------------------------------------------


def kv_bytes_per_token(model: Model, bytes_per_value: int = 2) -> int:
    """Keys and values of all layers for one token: 2 L G C values (2 bytes: bf16, 1: int8 without its scales)."""
    return 2 * model.num_hidden_layers * model.num_key_value_heads * model.head_dim * bytes_per_value


# --- communication ----------------------------------------------------------------------------------------------------


class Held(NamedTuple):
    """What one GPU holds of every tensor with a gradient, which the selection bias has not, in the module's order."""

    before: list[tuple[inventory.Entry, Box]]  # the embedding
    layer: list[tuple[inventory.Entry, Box]]  # of the first layer; all are alike
    after: list[tuple[inventory.Entry, Box]]  # the last norm


def held(model: Model, place: Place) -> Held:
    """By the rules of mm_train.sharding, worked out for one layer only."""
    parts = Held([], [], [])
    for entry, box in local_boxes(replace(model, num_hidden_layers=1), place):
        if not inventory.is_buffer(entry.name):
            in_layer = entry.name.startswith("model.layers.")
            (parts.layer if in_layer else parts.after if parts.layer else parts.before).append((entry, box))
    return parts


def trained_parameters(model: Model, place: Place) -> tuple[int, int]:
    """Parameters with a gradient that one GPU holds: (dense ones, routed experts)."""
    counts = {True: 0, False: 0}
    before, layer, after = held(model, place)
    for pairs, times in ((before, 1), (layer, model.num_hidden_layers), (after, 1)):
        for entry, box in pairs:
            counts[entry.part == "routed experts"] += times * box.size
    return counts[False], counts[True]


def communication(model: Model, layout: Layout) -> dict[str, int]:
    """Bytes that one GPU sends in one optimizer step, by kind, with their "total". All zero on one GPU.

    What mm_train.parallel makes DeepSpeed 0.19.8 do, in float32 because the parameters are (read in its
    runtime/engine.py and runtime/zero/stage_1_and_2.py, and counted call by call on one to four processes):

    - Gradients are all-reduced, not reduce-scattered: `use_multi_rank_bucket_allreduce` is on by default. A ring sends
      2 (n - 1) / n of the data. ZeRO 0 and 1 do it once a step, ZeRO 2 in every micro-step.
    - ZeRO 1 and 2 all-gather the weights after the step: (n - 1) / n of them.
    - n is the number of data-parallel GPUs for the dense part, and of those with the same experts for these.
    - Dispatch and combine (mm_train.dispatch) each exchange the expert rows of a layer in the forward and again in the
      backward pass, in the activations' dtype; (ep - 1) / ep of them leave the GPU if routing is balanced. With
      recomputation it is once more.

    Counts of rows, sums for the log and the gradient norm are left out: some kilobytes.
    """
    ep = layout.expert_parallel
    dense, experts = trained_parameters(model, layout.place)
    reductions = layout.micro_steps if layout.zero == 2 else 1
    kinds = {}
    for name, parameters, ranks in (
        ("dense", dense, layout.data_parallel),
        ("experts", experts, layout.expert_data_parallel),
    ):
        ring = FLOAT * parameters * (ranks - 1) / ranks
        kinds[f"gradient_all_reduce_{name}"] = round(2 * ring * reductions)
        kinds[f"weight_all_gather_{name}"] = round(ring) if layout.zero else 0
    passes = 3 if layout.recompute else 2
    rows = layout.expert_rows(model) * model.num_hidden_layers * layout.micro_steps
    exchange = passes * rows * model.hidden_size * layout.activation_bytes * (ep - 1) // ep
    kinds |= {"all_to_all_dispatch": exchange, "all_to_all_combine": exchange}
    kinds["tensor_all_reduce"] = _tensor_all_reduce(model, layout)
    return kinds | {"total": sum(kinds.values())}


def _tensor_all_reduce(model: Model, layout: Layout) -> int:
    """Bytes that tensor parallelism sends in a step (mm_train.parallel.tensors).

    Attention and each MLP all-reduce their output in the forward pass and the gradient of their input in the backward
    pass, in the activations' dtype; the embedding its float32 rows, forward; the head the gradient of its input. The
    loss exchanges three float32 values a token, and again when it is computed anew for the backward pass.
    Recomputation repeats the forward ones of a layer, but for the last of a dense network's layer: nothing after it is
    needed.
    """
    tp = layout.tensor_parallel
    mlps = 1 if model.intermediate_size_mlp else 0
    again = 0 if not layout.recompute else 1 + mlps if model.num_local_experts else mlps
    of_layers = model.num_hidden_layers * (2 * (1 + mlps) + again)
    a_token = model.hidden_size * (layout.activation_bytes * (of_layers + 1) + FLOAT) + 6 * FLOAT
    return 2 * a_token * layout.tokens * layout.micro_steps * (tp - 1) // tp


# --- time -------------------------------------------------------------------------------------------------------------


def tokens_per_second(flops_per_token: float, gpu: Gpu, mfu: float) -> float:
    """Of one GPU, at `mfu` (model FLOPs utilisation, 0..1) of its peak."""
    return gpu.tflops * 1e12 * mfu / flops_per_token


def days(tokens: float, gpus: int, per_gpu: float) -> float:
    """Days for a budget of `tokens` at `per_gpu` tokens a second on each of `gpus`."""
    return tokens / (per_gpu * gpus) / SECONDS_PER_DAY
