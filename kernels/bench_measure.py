"""Time and memory of a call on a GPU or CPU, and what the machine itself can do: the yardsticks of kernels.bench."""

import gc
import statistics
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

CACHE_BYTES = 256 * 2**20  # written before every measurement on a GPU: more than any second-level cache holds
SECONDS = 0.15  # of measurements of one call, about
REPEATS = 5, 50  # at least, at most
MAX_SLEEP = 5e-3  # seconds
SLEEP_CLOCK = 2e9  # cycles a second, about: how long the GPU sleeps need not be exact


class Measured(NamedTuple):
    """One call. Times in seconds."""

    seconds: float  # median
    fastest: float
    host_seconds: float  # until Python has it back: launching alone where nothing waits for the device
    peak_bytes: int | None  # memory taken beyond what was there; None on a CPU


def measure(call: Callable[[], Any], device: torch.device, seconds: float = SECONDS) -> Measured:
    """The median of several calls, after two to warm up.

    On a GPU the time is between events, with the second-level cache overwritten before each. The device is put to sleep
    while Python launches, so that what is measured is the kernels and not how fast they are launched; only a call that
    waits for the device in its middle shows that wait.
    """
    call()
    begun = time.perf_counter()
    call()
    host = time.perf_counter() - begun
    synchronize(device)
    once = time.perf_counter() - begun
    repeats = max(REPEATS[0], min(REPEATS[1], int(seconds / max(once, 1e-9))))
    times = _event_times(call, repeats, host) if device.type == "cuda" else _clock_times(call, repeats)
    return Measured(statistics.median(times), min(times), host, _peak(call, device))


def _clock_times(call: Callable[[], Any], repeats: int) -> list[float]:
    times = []
    for _ in range(repeats):
        begun = time.perf_counter()
        call()
        times.append(time.perf_counter() - begun)
    return times


def _event_times(call: Callable[[], Any], repeats: int, host: float) -> list[float]:
    cache = torch.empty(CACHE_BYTES, dtype=torch.int8, device="cuda")
    cycles = int(min(1.5 * host, MAX_SLEEP) * SLEEP_CLOCK)
    times = []
    for _ in range(repeats):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        cache.zero_()
        torch.cuda._sleep(cycles)
        start.record()
        call()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000)
    return times


def _peak(call: Callable[[], Any], device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    call()
    synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second of a plain copy, reads and writes counted: what a kernel that moves rows is measured by."""
    source = torch.zeros((2**30 if device.type == "cuda" else 2**26) // 4, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / measure(lambda: target.copy_(source), device).seconds


def matmul_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOPs a second of one large square matrix product in `dtype`."""
    n = 8192 if device.type == "cuda" else 512
    a, b = torch.randn(2, n, n, device=device).to(dtype)
    out = torch.empty_like(a)
    return 2 * n**3 / measure(lambda: torch.mm(a, b, out=out), device).seconds


def error(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected|, in the Euclidean norm; infinite where something is not finite."""
    found, expected = found.double(), expected.double()
    if not bool(found.isfinite().all()):
        return float("inf")
    return float((found - expected).norm() / expected.norm().clamp_min(1e-30))
