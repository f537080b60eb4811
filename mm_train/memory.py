"""Memory that training takes on one GPU, by part. Arithmetic only, torch-free.

It describes this project's code, tensor by tensor: model.py, moe.py, kernels/ and parallel/ for what autograd saves,
engine.py and DeepSpeed 0.19.8 for weights, gradients and optimizer state. No weight is kept in bf16.
Axes as in costs.py; R rows of the experts, F width of a routed expert, S of the shared one or a dense network's MLP.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mm_train.config import Model
from mm_train.costs import FLOAT, Layout, held
from mm_train.inventory import Entry
from mm_train.optim_groups import MUON_PARTS
from mm_train.sharding import Box

CHUNK_ROWS = 1024  # of kernels.cross_entropy, which needs torch; a test compares them
MUON_CHUNK = 1 << 25  # muon.CHUNK, likewise
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
    head_gradient: int  # d loss / d embedding in float32, which the fused cross-entropy makes in the forward pass

    @property
    def total(self) -> int:
        return self.activations + self.weight_copies + self.head_gradient


def saved_for_backward(model: Model, layout: Layout, fused_norms: bool = True) -> Saved:
    """What torch's saved_tensors_hooks would count, each storage once and parameters left out.

    `fused_norms`: rms_norm as CUDA computes it, which keeps its input only; on a CPU it is composed of other
    operations and keeps the normalised values as well.
    """
    size, width, layers = layout.activation_bytes, model.hidden_size, model.num_hidden_layers
    layer = saved_by_a_layer(model, layout, fused_norms)
    if layout.recompute:
        layer = Saved(layout.tokens * size * width, 0, 0)  # its input
    # Last norm, gradient of its output (made in the forward pass), token id, a row of the mask.
    per_token = _norm(model, fused_norms) + size * width + 8 + size * layout.context
    rope = FLOAT * model.head_dim * layout.context  # cos and sin
    head_gradient = FLOAT * _table(model, layout)
    if layout.tensor_parallel > 1:  # the loss is computed again instead: no gradients, but what that takes
        per_token += 8 + 8 + 1  # labels; token id in the own part of the vocabulary, and whether it lies there
        head_gradient = size * _table(model, layout) if size < FLOAT else 0  # the table, cast
    return Saved(
        activations=layers * layer.activations + layout.tokens * per_token + rope,
        weight_copies=layers * layer.weight_copies,
        head_gradient=head_gradient,
    )


def saved_by_a_layer(model: Model, layout: Layout, fused_norms: bool = True) -> Saved:
    """What one layer keeps, or makes again for its part of the backward pass if it is recomputed."""
    per_token = 2 * _norm(model, fused_norms) + _attention(model, layout) + _feed_forward(model, layout)
    row = layout.activation_bytes * (2 * model.hidden_size + 3 * model.intermediate_size)  # ends, gate and up, product
    row += 8 * (3 if layout.expert_parallel > 1 else 1)  # which slot fills it; the order of received rows, both ways
    layer = held(model, layout.place).layer
    matrices = sum(box.size for entry, box in layer if len(entry.shape) >= 2 and entry.part != "router")
    copied = layout.activation_bytes < FLOAT or layout.quantised
    return Saved(
        activations=layout.tokens * per_token + row * layout.expert_rows(model),
        weight_copies=layout.activation_bytes * matrices if copied else 0,
        head_gradient=0,
    )


def _norm(model: Model, fused: bool) -> int:
    """Bytes a token of a norm keeps: input in float32 and 1 / rms."""
    return FLOAT * (model.hidden_size + 1) + (0 if fused else FLOAT * model.hidden_size)


def _table(model: Model, layout: Layout) -> int:
    """Elements of the embedding on one GPU."""
    return model.vocab_size // layout.tensor_parallel * model.hidden_size


def _attention(model: Model, layout: Layout) -> int:
    """Bytes a token of one layer's attention keeps."""
    size, width = layout.activation_bytes, model.hidden_size
    heads = model.num_attention_heads // layout.tensor_parallel
    rotated = heads + model.num_key_value_heads // layout.tensor_parallel
    inputs = size * width  # of q, k and v; quantised ones are separate copies
    qk_norm = FLOAT * rotated * (model.head_dim + 1)
    # q, k, v and output of the fused attention (k and v repeated for every query head), its log-sum-exp. The mask that
    # keeps documents apart is one for all layers.
    fused = size * 4 * heads * model.head_dim + FLOAT * heads
    if layout.quantised:
        inputs = 3 * inputs + size * heads * model.head_dim
    return inputs + qk_norm + fused


def _feed_forward(model: Model, layout: Layout) -> int:
    """Bytes a token of one layer's router and shared expert (or dense MLP) keeps; routed experts: _expert_values."""
    size, width, experts = layout.activation_bytes, model.hidden_size, model.num_local_experts
    mlp = 4 * size * model.intermediate_size_mlp // layout.tensor_parallel  # gate, silu(gate), up, their product
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


# --- weights, gradients, optimizer ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shares:
    """Elements that one GPU holds."""

    parameters: int  # with a gradient
    partition: int  # of them it updates: its part of DeepSpeed's flat parameter groups
    touched: int  # at most: size of all tensors that its part touches, whose gradients DeepSpeed keeps whole
    muon: int = 0  # of the partition, those that Muon moves: they have one moment


def shares(model: Model, layout: Layout) -> Shares:
    """How parameters are spread over the GPUs. ZeRO cuts each parameter group into equal parts."""
    rest, experts = _trained(model, layout)
    groups = [
        ([box.size for box in group], layout.data_parallel, muon)
        for muon, group in (
            (False, [box for entry, box in rest if not _by_muon(entry, layout) and len(box.shape) >= 2]),
            (False, [box for entry, box in rest if not _by_muon(entry, layout) and len(box.shape) < 2]),
            (True, [box for entry, box in rest if _by_muon(entry, layout)]),
        )
    ]
    sizes = [box.size for _, box in experts]
    groups += [(group, layout.expert_data_parallel, layout.muon) for group in _split(sizes, MAX_EXPERT_GROUP)]
    if not layout.zero:
        whole = sum(sum(sizes) for sizes, _, _ in groups)
        return Shares(whole, whole, whole, sum(sum(sizes) for sizes, _, muon in groups if muon))
    parts = [(*_partition(sizes, ranks), ranks, muon) for sizes, ranks, muon in groups]
    return Shares(
        parameters=sum(part * ranks for part, _, ranks, _ in parts),
        partition=sum(part for part, _, _, _ in parts),
        touched=sum(touched for _, touched, _, _ in parts),
        muon=sum(part for part, _, _, muon in parts if muon),
    )


def _by_muon(entry: Entry, layout: Layout) -> bool:
    return layout.muon and entry.part in MUON_PARTS


Held = list[tuple[Entry, Box]]


def _trained(model: Model, layout: Layout) -> tuple[Held, Held]:
    """What one GPU holds of the tensors with a gradient: (ordinary ones, experts that others hold other ones of).

    With every expert everywhere, experts are ordinary parameters.
    """
    found: tuple[Held, Held] = ([], [])
    before, layer, after = held(model, layout.place)
    for entry, box in before + layer * model.num_hidden_layers + after:
        found[layout.expert_parallel > 1 and entry.part == "routed experts"].append((entry, box))
    return found


def _largest_bucket(model: Model, layout: Layout) -> int:
    """Elements of the largest bucket in which ZeRO 0 copies and all-reduces gradients: the first that is full."""
    most = 0
    for boxes in _trained(model, layout):
        bucket = 0
        for _, box in boxes:
            bucket += box.size
            most = max(most, bucket)
            if bucket > REDUCE_BUCKET:
                bucket = 0
    return most


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

    Plain engine and ZeRO 0: 4 bytes a parameter each for weight, gradient and two moments. ZeRO 0 reduces gradients
    through copies, bucket by bucket. ZeRO 1: weights and gradients whole, a float32 master copy of this GPU's part
    although the weights are float32 already, and moments of that part. ZeRO 2: gradients of that part only, and those
    of a micro-step beside the sum of the ones before. "Part" is over the data-parallel GPUs for the dense parameters,
    and over those with the same experts. Muon keeps one moment of the matrices that it moves, and takes working memory
    in the optimizer step.
    """
    own = shares(model, layout)
    zero = layout.zero
    saved = saved_for_backward(model, layout)
    biases = FLOAT * model.num_local_experts * model.num_hidden_layers
    gradients, buckets = FLOAT * own.parameters, 0
    bucketed = FLOAT * min(REDUCE_BUCKET, own.parameters)  # the copy of a full bucket that is all-reduced
    step = gradients  # gradients and buffers at their most in the optimizer step
    if layout.deepspeed and zero == 0:
        step += FLOAT * _largest_bucket(model, layout)
    elif zero == 1:
        buckets = FLOAT * REDUCE_BUCKET
        # while the last buckets fill, gradients become parts; then parts are flattened, group by group
        step = max(gradients - bucketed + buckets + FLOAT * own.touched, FLOAT * (own.touched + own.partition))
    elif zero == 2:
        gradients = FLOAT * own.touched * min(2, layout.micro_steps)
        buckets = FLOAT * REDUCE_BUCKET + bucketed
        step = FLOAT * (own.touched + own.partition)
    step += _orthogonalising(model, layout)
    loss, backward = _loss_buffers(model, layout), _backward_buffers(model, layout)
    if layout.recompute:
        backward += _recomputed(model, layout)
    passes = {
        "gradients": gradients,
        "activations": saved.activations,
        "weight_copies": saved.weight_copies,
        "loss_and_backward_buffers": max(loss, backward),
        "gradient_buckets": buckets,
    }
    parts = {
        "weights": FLOAT * own.parameters + biases,
        "master_weights": FLOAT * own.partition if zero else 0,
        "moments": FLOAT * (2 * own.partition - own.muon),
        **passes,
        "optimizer_step": max(0, step - sum(passes.values())),
        "cuda_context": int(GIB * (CUDA_CONTEXT_GIB + (NCCL_GIB if layout.gpus > 1 else 0))),
    }
    return parts | {"total": sum(parts.values())}


def _orthogonalising(model: Model, layout: Layout) -> int:
    """Peak inside muon.MuonAdamW: matrices of one tensor at a time, at most MUON_CHUNK elements.

    Their momentum in float32, twice as a blocks' copy is made; in the activations' dtype before and after an iteration,
    and the products of their shorter sides, which are at most as large.
    """
    matrices = [
        (box.size * (layout.tensor_parallel if entry.part != "routed experts" else 1), entry.shape[-2:])
        for entry, box in held(model, layout.place).layer
        if _by_muon(entry, layout)
    ]
    if not matrices:
        return 0
    size = layout.activation_bytes
    largest = max(min(total, max(MUON_CHUNK, math.prod(shape))) for total, shape in matrices)
    return largest * (2 * FLOAT + 3 * size)


def _recomputed(model: Model, layout: Layout) -> int:
    """What the backward pass of the last layer makes again, beside what was saved and less what it no longer needs:
    what the last norm and the head kept. In float32 the layer's input serves its first norm too."""
    shared = FLOAT * model.hidden_size if layout.activation_bytes == FLOAT else 0
    freed = _norm(model, fused=True) + shared
    return saved_by_a_layer(model, layout).total - layout.tokens * freed


def _loss_buffers(model: Model, layout: Layout) -> int:
    """Peak inside kernels.cross_entropy, which runs when all saved activations are there.

    Always alive: the gradient of the embedding in float32 and the embedding in the activations' dtype (and
    fake-quantised, in float32). A chunk's logits, and either the next chunk's while the last one's logits,
    probabilities and their gradient are still referred to, or the chunk's share of the embedding's gradient.
    """
    size, table = layout.activation_bytes, _table(model, layout)
    chunk = min(CHUNK_ROWS, layout.tokens) * model.vocab_size // layout.tensor_parallel
    narrow = size if size < FLOAT else 0  # a cast copy, where casting copies
    if layout.tensor_parallel > 1:  # in the backward pass: logits and their gradient, two sums of the table's gradient
        return chunk * (2 * FLOAT + 2 * narrow) + table * (narrow + 2 * size)
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
    mlp = 2 * size * model.intermediate_size_mlp // layout.tensor_parallel * layout.tokens
    largest = max(box.size for entry, box in held(model, layout.place).layer if entry.part != "router")
    head = _table(model, layout) * FLOAT
    return head + max(routed, mlp) + largest * (FLOAT + (size if size < FLOAT else 0))
