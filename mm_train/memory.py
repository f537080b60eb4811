"""Memory that training takes on one GPU, by part. Arithmetic only, torch-free.

It describes this project's code, tensor by tensor: model.py, moe.py and kernels/ for what autograd saves, engine.py and
DeepSpeed 0.19.8 for weights, gradients and optimizer state. No activation is recomputed and no weight is kept in bf16.
Axes as in costs.py; R rows of the experts, F width of a routed expert, S of the shared one or a dense network's MLP.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mm_train import inventory
from mm_train.config import Model
from mm_train.costs import FLOAT, Layout

CHUNK_ROWS = 1024  # of kernels.cross_entropy, which needs torch; a test compares them
REDUCE_BUCKET = 500_000_000  # elements: DeepSpeed's reduce_bucket_size, which mm_train.parallel leaves as it is
MAX_EXPERT_GROUP = 178_956_971  # elements: DeepSpeed splits experts into parameter groups of at most this size
ALIGNMENT = 2  # DeepSpeed pads a parameter group to a multiple of this times its ranks
GIB = 2**30
# Assumed, not derived: CUDA context, cuBLAS workspace and loaded kernels; NCCL's buffers where there are several GPUs.
CUDA_CONTEXT_GIB, NCCL_GIB = 1.0, 1.0


@dataclass(frozen=True)
class Saved:
    """Bytes that autograd holds between the forward and the backward pass of one micro-batch."""

    activations: int
    weight_copies: int  # weights in the activations' dtype: a linear layer keeps the one it multiplied with
    head_gradient: int  # d loss / d embedding, which the fused cross-entropy makes in the forward pass

    @property
    def total(self) -> int:
        return self.activations + self.weight_copies + self.head_gradient


def saved_for_backward(model: Model, layout: Layout, fused_norms: bool = True) -> Saved:
    """What torch's saved_tensors_hooks would count, each storage once and parameters left out.

    `fused_norms`: rms_norm as CUDA computes it, which keeps its input only; on a CPU it is composed of other
    operations and keeps the normalised values as well.
    """
    size, width = layout.activation_bytes, model.hidden_size
    norm = FLOAT * (width + 1) + (0 if fused_norms else FLOAT * width)  # input in float32 and 1 / rms
    per_token = model.num_hidden_layers * (2 * norm + _attention(model, layout) + _feed_forward(model, layout))
    per_token += norm + size * width + 8  # last norm, gradient of its output (made in the forward pass), token id
    rope = FLOAT * model.head_dim * layout.context  # cos and sin
    rows = 8 * layout.expert_rows(model) * model.num_hidden_layers  # which slot fills which row
    if layout.expert_parallel > 1:
        rows *= 3  # and the order of the received rows, both ways
    matrices = sum(
        entry.size
        for entry in _local_tensors(model, layout)
        if len(entry.shape) >= 2 and entry.part not in ("embedding", "router")
    )
    copied = size < FLOAT or layout.quantised
    return Saved(
        activations=layout.tokens * per_token + _expert_values(model, layout) + rows + rope,
        weight_copies=size * matrices if copied else 0,
        head_gradient=size * model.vocab_size * width,
    )


def _attention(model: Model, layout: Layout) -> int:
    """Bytes a token of one layer's attention keeps."""
    size, width, heads = layout.activation_bytes, model.hidden_size, model.num_attention_heads
    rotated = heads + model.num_key_value_heads
    inputs = size * width  # of q, k and v; quantised ones are separate copies
    qk_norm = FLOAT * rotated * (model.head_dim + 1)
    # q, k, v and output of the fused attention (k and v repeated for every query head), its log-sum-exp, and one row
    # of the mask: documents do not see each other, so every layer keeps a T x T mask a row, in the activations' dtype.
    fused = size * 4 * heads * model.head_dim + FLOAT * heads + size * layout.context
    if layout.quantised:
        inputs = 3 * inputs + size * heads * model.head_dim
    return inputs + qk_norm + fused


def _feed_forward(model: Model, layout: Layout) -> int:
    """Bytes a token of one layer's router and shared expert (or dense MLP) keeps; routed experts: _expert_values."""
    size, width, experts = layout.activation_bytes, model.hidden_size, model.num_local_experts
    mlp = 4 * size * model.intermediate_size_mlp  # gate, silu(gate), up, their product
    inputs = size * width * (2 if layout.quantised else 1)
    if not experts:
        return mlp + inputs
    router = FLOAT * width  # its input
    router += (2 * FLOAT + 8) * experts + FLOAT  # logits, scores, sorted expert ids, log-sum-exp
    router += (FLOAT + 8) * model.num_experts_per_tok  # weights, and which row serves a slot
    if model.norm_topk_prob:
        router += FLOAT * (model.num_experts_per_tok + 1)  # the weights before they are normalised, and their sum
    if size == FLOAT and not layout.quantised:
        inputs = 0  # the router keeps the same tensor
    return router + (mlp + inputs if model.intermediate_size_mlp else 0)


def _expert_values(model: Model, layout: Layout) -> int:
    """Bytes the expert rows of all layers keep: input, gate and up, silu(gate), product, output."""
    row = layout.activation_bytes * (2 * model.hidden_size + 4 * model.intermediate_size)
    return row * layout.expert_rows(model) * model.num_hidden_layers


# --- weights, gradients, optimizer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Elements that one GPU holds."""

    parameters: int  # with a gradient
    partition: int  # of them it updates: its part of DeepSpeed's flat parameter groups
    touched: int  # at most: size of all tensors that its part touches, whose gradients DeepSpeed keeps whole


def shares(model: Model, layout: Layout) -> Shares:
    """How parameters are spread over the GPUs. ZeRO cuts each parameter group into equal parts."""
    entries = [e for e in _local_tensors(model, layout) if not e.name.endswith("expert_bias")]
    sharded = layout.expert_parallel > 1  # with every expert everywhere, experts are ordinary parameters
    experts = [e.size for e in entries if sharded and e.part == "routed experts"]
    rest = [e for e in entries if not (sharded and e.part == "routed experts")]
    groups = [
        ([e.size for e in rest if len(e.shape) >= 2], layout.gpus),
        ([e.size for e in rest if len(e.shape) < 2], layout.gpus),
        *((group, layout.expert_data_parallel) for group in _split(experts, MAX_EXPERT_GROUP)),
    ]
    parts = [_partition(sizes, ranks) for sizes, ranks in groups]
    parameters = sum(part * ranks for (part, _), (_, ranks) in zip(parts, groups, strict=True))
    return Shares(parameters, sum(part for part, _ in parts), sum(touched for _, touched in parts))


def _local_tensors(model: Model, layout: Layout) -> Iterator[inventory.Entry]:
    """The network's tensors as one GPU holds them: routed experts are shared out over the expert-parallel group."""
    for entry in inventory.tensors(model):
        if entry.part == "routed experts":
            entry = entry._replace(shape=(entry.shape[0] // layout.expert_parallel, *entry.shape[1:]))
        yield entry


def _split(sizes: Sequence[int], limit: int) -> list[list[int]]:
    """Consecutive tensors in groups of at most `limit` elements."""
    groups: list[list[int]] = []
    for size in sizes:
        if groups and sum(groups[-1]) + size <= limit:
            groups[-1].append(size)
        else:
            groups.append([size])
    return groups


def _partition(sizes: Sequence[int], ranks: int) -> tuple[int, int]:
    """(elements of a rank's part, most elements of the tensors that one rank's part touches)."""
    part = -(-sum(sizes) // (ALIGNMENT * ranks)) * ALIGNMENT
    touched: dict[int, int] = {}
    start = 0
    for size in sizes:
        # The ranks between a tensor's first and last touch nothing else, so they cannot have more.
        for rank in {start // part, (start + size - 1) // part}:
            touched[rank] = touched.get(rank, 0) + size
        start += size
    return part, max(touched.values(), default=0)


# --- the whole --------------------------------------------------------------------------------------------------------


def memory_bytes(model: Model, layout: Layout) -> dict[str, int]:
    """Estimated peak of one GPU's memory in bytes, by part, with its "total".

    Two moments compete for the peak: the end of the forward pass or start of the backward pass (everything but
    "optimizer_step" is alive), and the optimizer step, when activations are gone. "optimizer_step" is what the second
    needs beyond the first, usually 0, so that the parts add up. What the allocator loses in fragments is not in it.

    Plain engine: 4 bytes a parameter each for weight, gradient and two moments. ZeRO 1: weights and
    gradients whole, a float32 master copy of this GPU's part although the weights are float32 already, and moments of
    that part. ZeRO 2: gradients of that part only, and those of a micro-step beside the sum of the ones before. "Part"
    is over all GPUs for the dense parameters, and over those with the same experts.
    """
    own = shares(model, layout)
    zero = layout.zero_stage if layout.deepspeed else 0  # 0: the plain engine
    saved = saved_for_backward(model, layout)
    biases = FLOAT * model.num_local_experts * model.num_hidden_layers
    gradients, buckets = FLOAT * own.parameters, 0
    bucketed = FLOAT * min(REDUCE_BUCKET, own.parameters)  # the copy of a full bucket that is all-reduced
    step = gradients  # gradients and buffers at their most in the optimizer step
    if zero == 1:
        buckets = FLOAT * REDUCE_BUCKET
        # while the last buckets fill, gradients become parts; then parts are flattened, group by group
        step = max(gradients - bucketed + buckets + FLOAT * own.touched, FLOAT * (own.touched + own.partition))
    elif zero == 2:
        gradients = FLOAT * own.touched * min(2, layout.micro_steps)
        buckets = FLOAT * REDUCE_BUCKET + bucketed
        step = FLOAT * (own.touched + own.partition)
    passes = {
        "gradients": gradients,
        "activations": saved.activations,
        "weight_copies": saved.weight_copies,
        "loss_and_backward_buffers": max(_loss_buffers(model, layout), _backward_buffers(model, layout)),
        "gradient_buckets": buckets,
    }
    parts = {
        "weights": FLOAT * own.parameters + biases,
        "master_weights": FLOAT * own.partition if zero else 0,
        "moments": 2 * FLOAT * (own.partition if zero else own.parameters),
        **passes,
        "optimizer_step": max(0, step - sum(passes.values())),
        "cuda_context": int(GIB * (CUDA_CONTEXT_GIB + (NCCL_GIB if layout.gpus > 1 else 0))),
    }
    return parts | {"total": sum(parts.values())}


def _loss_buffers(model: Model, layout: Layout) -> int:
    """Peak inside kernels.cross_entropy, which runs when all activations are saved.

    Always alive: the gradient of the embedding in float32 and the embedding in the activations' dtype (and
    fake-quantised, in float32). A chunk's logits, and either the next chunk's while the last one's logits,
    probabilities and their gradient are still referred to, or the chunk's share of the embedding's gradient.
    """
    size, table = layout.activation_bytes, model.vocab_size * model.hidden_size
    chunk = min(CHUNK_ROWS, layout.tokens) * model.vocab_size
    narrow = size if size < FLOAT else 0  # a cast copy, where casting copies
    alive = table * (FLOAT + narrow + (FLOAT if layout.quantised else 0))
    alive += layout.tokens * model.hidden_size * size * (2 if layout.quantised else 1)  # the head's input
    several = layout.tokens > CHUNK_ROWS
    logits = chunk * (2 * FLOAT + narrow + (FLOAT + narrow if several else 0))
    gradient = chunk * (2 * FLOAT + narrow) + table * (FLOAT + narrow)
    return alive + max(logits, gradient)


def _backward_buffers(model: Model, layout: Layout) -> int:
    """What the backward pass of the last layer holds beside the activations, nearly all of which are still there.

    The embedding's gradient from the head waits in float32 for that from the look-up, which comes last. Routed experts:
    the gradient of their rows, and the rows themselves by token (drop-and-pad copies them once more on the way). A
    dense or shared MLP: two gradients of its width beyond what is freed meanwhile. The largest weight has its gradient
    in the activations' dtype and in float32.
    """
    size = layout.activation_bytes
    slots, rows = layout.tokens * model.num_experts_per_tok, layout.expert_rows(model)
    routed = size * model.hidden_size * (slots + (rows if layout.capacity_factor is None else 2 * rows))
    mlp = 2 * size * model.intermediate_size_mlp * layout.tokens
    parts = ("embedding", "router")
    largest = max(entry.size for entry in _local_tensors(model, layout) if entry.part not in parts)
    head = model.vocab_size * model.hidden_size * FLOAT
    return head + max(routed, mlp) + largest * (FLOAT + (size if size < FLOAT else 0))
