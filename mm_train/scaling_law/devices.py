"""What a device can at most do with a network: bounds on prefill and decode from bandwidth and arithmetic. Torch-free.

Batch 1, int4 weights, int8 activations and cache. Decoding reads the weights that a token meets, and the cache, once a
token; prefill reads all weights once and computes everything but the head for each token. Real programs reach a part of
that: the paper's S on a Galaxy S25 decodes 138 tokens/s at a context of 256, a quarter of the bound.
"""

import difflib
from dataclasses import dataclass
from typing import NamedTuple

from mm_train import costs
from mm_train.cli import UserError
from mm_train.config import Model
from mm_train.release_format import stored_tensors

DENSE_PRO = "the prefill of the dense MobileLLM-Pro in arXiv 2605.27358 (2 x 1.084e9 FLOP a token, 1024 tokens in {} s)"


@dataclass(frozen=True)
class Device:
    """`operations` may be a peak or what was reached; `source` says which, and where the numbers are from."""

    name: str
    bandwidth: float  # bytes a second
    operations: float  # multiplications and additions a second
    source: str


DEVICES = {
    "galaxy-s25": Device(
        "Samsung Galaxy S25, CPU", 84.8e9, 2 * 1.084e9 * 1024 / 4.26,
        "Snapdragon 8 Elite: LPDDR5X, 64 bits at 10,600 MT/s (peak); operations reached in " + DENSE_PRO.format(4.26),
    ),
    "iphone-16-pro": Device(
        "Apple iPhone 16 Pro, CPU", 60e9, 2 * 1.084e9 * 1024 / 6.03,
        "A18 Pro: LPDDR5X, 64 bits at 7,500 MT/s (peak); operations reached in " + DENSE_PRO.format(6.03),
    ),
    "raspberry-pi-5": Device(
        "Raspberry Pi 5, CPU", 17.1e9, 4 * 2.4e9 * 2 * 32,
        "BCM2712: LPDDR4X, 32 bits at 4,267 MT/s; 4 Cortex-A76 at 2.4 GHz, 2 int8 dot products of 16 bytes a cycle"
        " (peaks)",
    ),
}  # fmt: skip


class Bounds(NamedTuple):
    """Upper bounds at one context."""

    decode: float  # tokens a second
    decode_limit: str  # bandwidth | arithmetic
    prefill: float  # tokens a second
    prefill_limit: str
    first_token: float  # seconds for a prompt of the whole context


def find_device(name: str | None, bandwidth: float | None, operations: float | None) -> Device | None:
    """A device of the table, or one of given numbers; None when nothing is asked.

    Raises UserError for an unknown name, and when only one number is given without one.
    """
    if name is not None and name not in DEVICES:
        near = difflib.get_close_matches(name, DEVICES, n=1)
        raise UserError(
            f"--device: unknown {name} ({f'did you mean {near[0]}?' if near else 'known: ' + ', '.join(DEVICES)})"
        )
    if name is None and bandwidth is None and operations is None:
        return None
    known = DEVICES.get(name or "")
    if known is None and (bandwidth is None or operations is None):
        raise UserError("a device of your own needs both --bandwidth (bytes/s) and --flops (operations/s)")
    if known is not None and bandwidth is None and operations is None:
        return known
    base = known or Device("your device", 0, 0, "given")
    source = f"given; {base.source}" if known else base.source
    return Device(base.name, bandwidth or base.bandwidth, operations or base.operations, source)


def active_int4_bytes(model: Model) -> int:
    """Bytes of an int4 release that one token's forward pass reads: of the routed experts the chosen ones."""
    read = 0
    for stored in stored_tensors(model, "int4"):
        routed = ".experts." in stored.name
        read += stored.bytes // model.num_local_experts * model.num_experts_per_tok if routed else stored.bytes
    return read


def bounds(model: Model, device: Device, context: int) -> Bounds:
    """Decoding with `context` tokens in the cache, and prefill of as many."""
    flops = costs.forward_flops(model, context)
    scores = flops["attention scores"]  # of the average token, which sees half of the context
    cache = context * costs.kv_bytes_per_token(model, 1)
    by_bytes = device.bandwidth / (active_int4_bytes(model) + cache)
    by_flops = device.operations / (sum(flops.values()) + scores)
    work = (sum(flops.values()) - flops["head"]) * context + flops["head"]
    loading = sum(stored.bytes for stored in stored_tensors(model, "int4")) / device.bandwidth
    computing = work / device.operations
    first = max(loading, computing)
    return Bounds(
        min(by_bytes, by_flops), "bandwidth" if by_bytes <= by_flops else "arithmetic",
        context / first, "bandwidth" if loading > computing else "arithmetic", first,
    )  # fmt: skip
