"""What `scaling_law plan` prints. Torch-free."""

import math
from collections.abc import Iterable, Sequence

import numpy as np

from mm_train.scaling_law import devices, solve
from mm_train.scaling_law.law import Law


def budget(law: Law, limits: solve.Budget) -> str:
    """The question."""
    said = [f"{limits.train_flops:.3g} training FLOPs (6 N D)", f"{limits.memory / solve.GIB:.3g} GiB on the device"]
    if limits.active_max < math.inf:
        said.append(f"at most {short(limits.active_max)} active parameters")
    if limits.tokens_min:
        said.append(f"at least {short(limits.tokens_min)} tokens")
    if limits.tokens_max < math.inf:
        said.append(f"at most {short(limits.tokens_max)} tokens")
    return (
        f"Budget: {', '.join(said)}; cache of {limits.context:,} tokens\n"
        f"Law: {law.source}; fitted to N {short(law.active_params[0])}..{short(law.active_params[1])},"
        f" D {short(law.tokens[0])}..{short(law.tokens[1])}, RMSE {law.rmse:.4f}"
    )


def table(rows: Sequence[solve.Row], best: solve.Row) -> str:
    """The best network of each expansion."""
    heads = ["E", "layers x width", "active", "total", "GiB", "tokens", "loss", "regret", "worst in range"]
    chances = rows[0].chance is not None
    heads += ["best in"] * chances
    cells = []
    for row in rows:
        o = row.option
        cells.append([
            f"{'* ' if row is best else ''}{o.expansion}", f"{o.model.num_hidden_layers} x {o.model.hidden_size}",
            short(o.active), short(o.total), f"{o.memory / solve.GIB:.2f}", short(o.tokens),
            f"{o.loss:.4f}", f"{row.regret:.4f}", f"{row.worst:.4f}",
        ])  # fmt: skip
        if chances and row.chance is not None:
            cells[-1].append(f"{row.chance:.0%}")
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    lines = ["  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in [heads, *cells]]
    notes = "regret: loss above the best; worst in range: the most at equal N and D anywhere in the law's range"
    return "\n".join(["", *lines, notes + ("; best in: of the bootstrap's laws" if chances else "")])


def warning(law: Law, option: solve.Option, expansions: Sequence[int], left: str) -> str:
    """What the law says outside of its range, against what it says at the nearest point inside."""
    there = solve.place(law, *solve.nearest(law, option), expansions)
    here = solve.place(law, option.active, option.tokens, expansions)
    lines = [
        "",
        f"WARNING: {left} that the law was fitted to. Regret of each expansion at equal N and D:",
        "  E".ljust(40) + "".join(f"{e:>9}" for e in expansions),
    ]
    for words, point in (("nearest in range", there), ("here", here)):
        name = f"  {words}: N {short(point.active)}, D {short(point.tokens)}"
        lines.append(name.ljust(40) + "".join(f"{point.regrets[e]:>9.4f}" for e in expansions))
    sparse = min(law.expansions, key=lambda e: abs(math.log(e / 8)))
    for other in (e for e in expansions if e < sparse):
        turn = solve.turning_point(law, option.active, sparse, other)
        if turn is not None and turn > law.tokens[1]:
            words = "a dense network" if other == 1 else f"E = {other}"
            lines.append(f"  from D = {short(turn)} on this law puts E = {sparse} behind {words}")
    if 1 in expansions and sparse in expansions:
        ahead = [point.regrets[1] - point.regrets[sparse] for point in (there, here)]
        lines.append(f"  E = {sparse} is {ahead[0]:+.4f} ahead of dense in range, and {ahead[1]:+.4f} here")
    return "\n".join(lines)


def inside(law: Law, option: solve.Option) -> str:
    """The flags that keep a plan in range."""
    flags = []
    if option.tokens > law.tokens[1]:
        flags.append(f"--tokens-max {short(law.tokens[1]).replace(' ', '')}")
    if option.tokens < law.tokens[0]:
        flags.append(f"--tokens-min {short(law.tokens[0]).replace(' ', '')}")
    if option.active > law.active_params[1]:
        flags.append(f"--active-max {short(law.active_params[1]).replace(' ', '')}")
    if option.active < law.active_params[0]:
        flags.append(f"networks from {short(law.active_params[0])} active parameters on")
    return ", ".join(flags)


def recommendation(
    law: Law, rows: Sequence[solve.Row], best: solve.Row, tolerance: float, context: int, device: devices.Device | None
) -> str:
    """The answer."""
    return "\n".join(["", *_recommendation(law, rows, best, tolerance, context, device)])


def _recommendation(
    law: Law, rows: Sequence[solve.Row], best: solve.Row, tolerance: float, context: int, device: devices.Device | None
) -> Iterable[str]:
    option, model = best.option, best.option.model
    near = ", ".join(str(row.option.expansion) for row in rows if row.regret <= tolerance)
    yield f"Recommended: E = {option.expansion}" + (
        f", g = {law.granularity}, shared expert {'on' if law.shared else 'off'}" if option.expansion > 1 else ", dense"
    )
    yield (
        f"  within {tolerance:.4f} of the best loss are E = {near}; of these E = {option.expansion} loses least where"
        f" it does worst in range ({best.worst:.4f})"
    )
    if law.source.startswith("arXiv 2605.27358"):
        yield "  g and the shared expert are the paper's findings: g = 16 gains under 0.01 for half as much time again;"
        yield "  without a shared expert the size term is 0.1670 against 0.1224"
    else:
        yield "  g and the shared expert are those of the runs"
    yield (
        f"  {model.num_hidden_layers} layers, width {model.hidden_size:,} (ratio"
        f" {model.hidden_size / model.num_hidden_layers:.1f}), {model.num_attention_heads} query and"
        f" {model.num_key_value_heads} key-value heads of {model.head_dim}, vocabulary {model.vocab_size:,}"
    )
    if option.expansion > 1:
        shared = f", shared expert of width {model.intermediate_size_mlp:,}" if model.intermediate_size_mlp else ""
        yield (
            f"  {model.num_local_experts} routed experts of width {model.intermediate_size:,},"
            f" {model.num_experts_per_tok} a token{shared}"
        )
    else:
        yield f"  MLP of width {model.intermediate_size_mlp:,}"
    yield f"  {option.total:,} parameters, {option.active:,} active per token (tied embedding once)"
    yield f"  {option.tokens:,} tokens, {6 * option.active * option.tokens:.4g} training FLOPs"
    yield f"  predicted loss {option.loss:.4f} nats per token" + _interval(law, option)
    yield (
        f"  int4 file {option.int4_bytes:,} bytes ({option.int4_bytes / solve.GIB:.2f} GiB), int8 cache of"
        f" {context:,} tokens {option.cache_bytes:,} bytes ({option.cache_bytes / solve.GIB:.2f} GiB)"
    )
    if device is not None:
        yield from _device(option, device, context)


def _interval(law: Law, option: solve.Option) -> str:
    if len(law.draws) < 2:
        return ""
    low, high = np.quantile(law.loss_draws(option.active, option.tokens, option.expansion), (0.025, 0.975))
    return f" (95 % of the bootstrap: {low:.4f} .. {high:.4f})"


def _device(option: solve.Option, device: devices.Device, context: int) -> Iterable[str]:
    speed = f"{device.bandwidth / 1e9:.4g} GB/s and {device.operations / 1e9:.4g} Gop/s"
    yield f"  {device.name}: at best, batch 1, with {speed}"
    for length in sorted({min(256, context), min(1024, context), context}):
        bound = devices.bounds(option.model, device, length)
        yield (
            f"    context {length:,}: decode {bound.decode:,.1f} tokens/s ({bound.decode_limit}), prefill"
            f" {bound.prefill:,.0f} tokens/s ({bound.prefill_limit}), first token after {bound.first_token:.2f} s"
        )
    yield f"    ({device.source})"


def short(value: float) -> str:
    """1.5e9 -> 1.5 B."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if value >= size:
            return f"{value / size:.4g} {letter}"
    return f"{value:.4g}"
