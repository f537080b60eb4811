"""What mm_train.describe prints: its facts as aligned text. Knows no formula; torch-free."""

import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from mm_train import optim_groups
from mm_train.costs import SECONDS_PER_DAY
from mm_train.data_plan import SourcePlan, lines
from mm_train.describe_layouts import KEYS
from mm_train.describe_plan import CONTEXT

GIB, MIB = 2**30, 2**20
MEMORY = {  # parts of memory.memory_bytes, for people
    "weights": "weights, float32",
    "master_weights": "master copy of this GPU's part, float32",
    "moments": "moments of the optimizer, float32",
    "gradients": "gradients, float32",
    "activations": "activations saved for the backward pass",
    "weight_copies": "{dtype} copies of the weights, kept for the backward pass",
    "loss_and_backward_buffers": "buffers of loss and backward pass",
    "gradient_buckets": "DeepSpeed's gradient buckets",
    "optimizer_step": "more in the optimizer step",
    "cuda_context": "CUDA context, libraries, NCCL (assumed)",
    "total": "total",
}
COMMUNICATION = {
    "gradient_all_reduce_dense": "all-reduce of gradients, dense part",
    "weight_all_gather_dense": "all-gather of weights, dense part",
    "gradient_all_reduce_experts": "all-reduce of gradients, experts",
    "weight_all_gather_experts": "all-gather of weights, experts",
    "all_to_all_dispatch": "all-to-all of dispatch, forward and backward",
    "all_to_all_combine": "all-to-all of combine, forward and backward",
    "tensor_all_reduce": "all-reduce of tensor parallelism",
    "total": "total",
}


def text(facts: dict[str, Any]) -> str:
    """The whole report."""
    sections = (
        _network,
        _parameters,
        _device,
        _compute,
        _memory,
        _communication,
        _layouts,
        _time,
        _scale,
        _data,
        _notes,
        _hint,
    )
    blocks = ("\n".join(section(facts)) for section in sections)
    return "\n\n".join(block for block in blocks if block)


def _network(facts: dict[str, Any]) -> Iterable[str]:
    shape = facts["shape"]
    yield f"{facts['name']}: {facts['total_params']:,} parameters, {facts['active_params']:,} active per token"
    yield (
        f"  {shape['num_hidden_layers']} layers, width {shape['hidden_size']:,};"
        f" {shape['num_attention_heads']} query and {shape['num_key_value_heads']} key-value heads of"
        f" {shape['head_dim']}; vocabulary {shape['vocab_size']:,}, embedding tied to the head"
    )
    if not shape["num_local_experts"]:
        yield f"  dense: MLP of width {shape['intermediate_size_mlp']:,}"
        return
    shared = shape["intermediate_size_mlp"]
    yield (
        f"  {shape['num_local_experts']} routed experts of width {shape['intermediate_size']:,},"
        f" {shape['num_experts_per_tok']} a token, {shape['scoring_func']} router;"
        + (f" shared expert of width {shared:,}" if shared else " no shared expert")
    )


def _data(facts: dict[str, Any]) -> Iterable[str]:
    data = facts["data"]
    if data is None:
        return
    yield f"Data in {data['path']}"
    for line in lines(SourcePlan(**source) for source in data["sources"]):
        yield f"  {line.removeprefix('data ')}"
    for name in data["missing"]:
        yield f"  {name}: not prepared"
    if data["warning"]:
        yield from textwrap.wrap(data["warning"], 118, initial_indent="  ", subsequent_indent="  ")


def _parameters(facts: dict[str, Any]) -> Iterable[str]:
    yield "Parameters"
    active = facts["active_params"]
    rows = [
        (part, f"{count['total']:,}", f"{count['active']:,}", f"{count['active'] / active:.1%}")
        for part, count in facts["params_by_part"].items()
    ]
    rows.append(("total", f"{facts['total_params']:,}", f"{active:,}", "100.0%"))
    yield from _table(("part", "total", "active per token", "share of active"), rows)


def _device(facts: dict[str, Any]) -> Iterable[str]:
    yield "On the device"
    longest = facts["shape"]["max_position_embeddings"]
    cache = facts["kv_bytes_per_token"]
    yield from _table(
        ("", "bytes", ""),
        [
            ("bf16 file", f"{facts['bf16_bytes']:,}", f"{facts['bf16_bytes'] / GIB:.2f} GiB"),
            ("int4 file", f"{facts['int4_bytes']:,}", f"{facts['int4_bytes'] / GIB:.2f} GiB"),
            ("key-value cache of a token, bf16", f"{cache:,}", f"{cache * longest / MIB:,.0f} MiB at {longest:,}"),
            (
                "key-value cache of a token, int8",
                f"{cache // 2:,}",
                f"{cache // 2 * longest / MIB:,.0f} MiB at {longest:,}",
            ),
        ],
    )
    needed = facts["int4_bytes"] + cache // 2 * longest
    yield (
        f"  int4 weights and an int8 cache of {longest:,} tokens: {needed / GIB:.2f} GiB"
        f" ({needed / 1e9:.2f} GB; the paper allows 5 GB, {5e9 / GIB:.2f} GiB)"
    )


def _compute(facts: dict[str, Any]) -> Iterable[str]:
    total = facts["train_flops_per_token"]
    yield f"Compute per token, averaged over a row of {facts['context']:,} tokens with causal attention"
    rows = [
        (part, f"{flops / 1e6:,.1f}", f"{flops / total:.1%}", f"{flops / 3e6:,.1f}")
        for part, flops in sorted(facts["train_flops_by_part"].items(), key=lambda item: -item[1])
    ]
    rows.append(("total", f"{total / 1e6:,.1f}", "100.0%", f"{facts['inference_flops_per_token'] / 1e6:,.1f}"))
    yield from _table(("part", "training, MFLOP", "share", "inference, MFLOP"), rows)
    paper = 2 * facts["active_params"]
    yield f"  training {total / 1e9:.2f} GFLOP a token; the paper's 2 x active for inference: {paper / 1e6:,.1f} MFLOP"
    hardware, layout = facts["hardware_train_flops_per_token"], facts["layout"]
    if hardware != total:
        more = {
            f"the padding of capacity factor {layout['capacity_factor']}": layout["capacity_factor"] is not None,
            "the layers' forward pass once more": layout["recompute"] == "layer",
            f"routed experts {layout['tensor_parallel']} times": layout["tensor_parallel"] > 1,
        }
        said = " and ".join(words for words, so in more.items() if so)
        yield f"  {hardware / 1e9:.2f} GFLOP are done a token, with {said}; MFU counts the {total / 1e9:.2f}"


def _memory(facts: dict[str, Any]) -> Iterable[str]:
    layout, gpu = facts["layout"], facts["gpu"]
    engine = f"DeepSpeed, ZeRO {layout['zero_stage']}" if layout["engine"] == "deepspeed" else "plain PyTorch, no ZeRO"
    tensor = f", tensor parallel {layout['tensor_parallel']}" if layout["tensor_parallel"] > 1 else ""
    again = ", layers recomputed" if layout["recompute"] == "layer" else ""
    how = f"expert parallel {layout['expert_parallel']}{tensor}, {engine}{again}"
    yield f"Training on {layout['gpus']:,} x {gpu['name']}, {how}"
    yield (
        f"  micro-batch of {layout['micro_batch_size']} x {facts['context']:,} tokens a GPU,"
        f" {layout['micro_steps']:,} of them a step, global batch {layout['global_batch_tokens']:,} tokens;"
        f" {layout['activation_dtype']} activations" + (", quantisation-aware" if layout["quantisation_aware"] else "")
    )
    for line in optim_groups.lines(facts["optimizer_groups"]):
        yield f"  {line}"
    yield ""
    yield "Memory of one GPU (estimate)"
    parts = facts["memory_gib"]
    dtype = "bf16" if layout["activation_dtype"] == "bfloat16" else "float32"
    rows = [(MEMORY[part].format(dtype=dtype), f"{size:,.2f}") for part, size in parts.items() if size]
    yield from _table(("part", "GiB"), rows)
    fits = "fits" if facts["fits"] else "does NOT fit"
    yield f"  {fits} into the {gpu['memory_gib']:g} GiB of {gpu['name']} with 5 % to spare for fragments"


def _communication(facts: dict[str, Any]) -> Iterable[str]:
    yield "Communication: bytes that one GPU sends in an optimizer step (estimate)"
    kinds = facts["comm_bytes_per_step"]
    if not kinds["total"]:
        yield "  none"
        return
    rows = [(COMMUNICATION[kind], f"{size:,}", f"{size / GIB:,.2f}") for kind, size in kinds.items() if size]
    yield from _table(("kind", "bytes", "GiB"), rows)
    rate = kinds["total"] / facts["seconds_per_step"] / GIB
    yield f"  {rate:,.1f} GiB/s on average over a step of {facts['seconds_per_step']:,.3g} s"


def _layouts(facts: dict[str, Any]) -> Iterable[str]:
    """A line for each layout; with recomputation it has columns of its own."""
    own, chosen = facts["layout"], facts["recommendation"]
    yield f"Layouts on {_gpus(own['gpus'])} (estimate; micro-batch of {own['micro_batch_size']})"
    lines: dict[str, list[str]] = {}
    for layout in facts["layouts"]:
        zero = f"ZeRO {layout['zero_stage']}" if own["engine"] == "deepspeed" else "no ZeRO"
        tensor = f", tensor parallel {layout['tensor_parallel']}" if layout["tensor_parallel"] > 1 else ""
        cells = lines.setdefault(
            f"expert parallel {layout['expert_parallel']}{tensor}, {zero}", ["", "", "", "", "", ""]
        )
        first = 3 if layout["recompute"] == "layer" else 0
        cells[first : first + 3] = (
            f"{layout['memory_gib_total']:,.1f}",
            ("yes" if layout["fits"] else "no") + (" *" if all(layout[key] == chosen[key] for key in KEYS) else "  "),
            f"{layout['comm_bytes_per_step_total'] / GIB:,.2f}",
        )
    heads = ("GiB a GPU", "fits  ", "GiB sent a step", "recomputed: GiB a GPU", "fits  ", "GiB sent a step")
    yield from _table(("", *heads), [(name, *cells) for name, cells in lines.items()])
    hidden = {"tensor_parallel": 1} | ({} if own["engine"] == "deepspeed" else {"zero_stage": chosen["zero_stage"]})
    words = " ".join(f"{key}={chosen[key]}" for key in KEYS if chosen[key] != hidden.get(key))
    yield f"  * recommended: {words}" if chosen["expert_parallel"] else "  none is recommended:"
    yield from textwrap.wrap(chosen["why"], 112, initial_indent="    ", subsequent_indent="    ")
    if chosen["paper"]:
        yield f"  the paper's: {chosen['paper']}"


def _time(facts: dict[str, Any]) -> Iterable[str]:
    gpu = facts["gpu"]
    yield f"Time for {_short(facts['tokens'])} tokens (estimate)"
    yield (
        f"  at {100 * facts['mfu']:.3g}% MFU of {gpu['tflops']:,} TFLOP/s (dense bf16, {gpu['source']}):"
        f" {facts['tokens_per_second_per_gpu']:,.0f} tokens/s a GPU"
    )
    yield f"  {_days(facts['days'])} on {_gpus(facts['layout']['gpus'])}; {facts['gpu_hours']:,.0f} GPU hours"


def _scale(facts: dict[str, Any]) -> Iterable[str]:
    layout = facts["layout"]
    tensor = f" tensor parallel {layout['tensor_parallel']}," if layout["tensor_parallel"] > 1 else ""
    yield (
        f"The same on other numbers of GPUs (estimate): expert parallel {layout['expert_parallel']},{tensor}"
        f" ZeRO {layout['zero_stage']} on more than one"
    )
    rows = []
    for line in facts["scale"]:
        cells = ["-"] * 6
        if line["why_not"] is None:
            cells = [
                _days(line["days"]),
                f"{line['memory_gib_total']:,.1f}",
                "yes" if line["fits"] else "no",
                f"{line['micro_batch_size']} x {facts['context']:,}",
                f"{line['micro_steps']:,}",
                f"{line['comm_bytes_per_step_total'] / GIB:,.2f}",
            ]
        rows.append((f"{line['gpus']:,}", *cells))
    yield from _table(("GPUs", "time", "GiB a GPU", "fits", "micro-batch", "micro-steps", "GiB sent a step"), rows)
    for line in facts["scale"]:
        if line["why_not"]:
            yield f"  not on {_gpus(line['gpus'])}: {line['why_not']}"
        elif line["global_batch_tokens"] != layout["global_batch_tokens"]:
            yield f"  {_gpus(line['gpus'])}: that is a global batch of {line['global_batch_tokens']:,} tokens"


def _notes(facts: dict[str, Any]) -> Iterable[str]:
    yield "Behind the estimates"
    if facts["assumptions"]:
        yield "  taken because no stage file says otherwise:"
        yield from (f"    {words}" for words in facts["assumptions"])
    yield "  time: MFU is the only efficiency; communication, validation, checkpoints and what is computed twice have"
    yield "        to be within it"
    if facts["layout"]["activation_dtype"] == "float32":
        yield "        and it takes bf16 matmuls for granted, although this stage computes in float32"
    yield "  memory: every tensor this code keeps at the peak, on CUDA; nothing offloaded (memory.py)"
    yield "  communication: ring algorithms, gradients and weights in float32, balanced routing (costs.py)"


def _hint(facts: dict[str, Any]) -> Iterable[str]:
    """What to ask next, as words that work for this network."""
    experts = facts["shape"]["num_local_experts"]
    stage = "configs/stage/pretrain.yaml"  # its rows are CONTEXT long, its experts on four GPUs
    if facts["shape"]["max_position_embeddings"] < CONTEXT:
        stage = "configs/stage/tiny/pretrain.yaml"
    elif experts == 0 or experts % 4:
        stage += " parallel.expert_parallel=1"
    layout = "gpus=64" if experts == 0 or experts % 4 else "gpus=64 expert_parallel=4"
    yield f"another layout: --parallel {layout}; a stage: add {stage}"


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterable[str]:
    """Columns as wide as need be: the first to the left, the others to the right."""
    widths = [max(len(row[i]) for row in (heads, *rows)) for i in range(len(heads))]
    for row in [heads, *rows] if any(heads[1:]) else rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        yield ("  " + "  ".join(cells)).rstrip()


def _short(tokens: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if tokens >= size:
            return f"{tokens / size:,.4g} {letter}"
    return f"{tokens:,.0f}"


def _days(days: float) -> str:
    for size, unit in ((1, "days"), (1 / 24, "hours"), (1 / 24 / 60, "minutes")):
        if days >= size:
            return f"{days / size:,.1f} {unit}"
    return f"{days * SECONDS_PER_DAY:,.2g} seconds"


def _gpus(count: int) -> str:
    return f"{count:,} GPU" + ("s" if count > 1 else "")
