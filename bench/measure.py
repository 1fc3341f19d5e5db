"""Time, peak memory and FLOPs of a callable."""

from __future__ import annotations

import functools
import os
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from mfkernels.timing import busy_time, latency

# `bench/gpu.sh --rehearse`: everything runs once, at sizes at which no figure means anything
REHEARSAL = os.environ.get("BENCH_REHEARSAL") == "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def torch_compile(fn: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`fn` by `torch.compile`; in a rehearsal it is traced and run, without the minutes of a compiler."""
    if REHEARSAL:
        options.pop("mode", None)
        options["backend"] = "eager"
    return torch.compile(fn, dynamic=False, **options)


class Measured(NamedTuple):
    """Of a way and of what it is compared with, in one process."""

    seconds: float  # how long the device is busy with one call
    ratio: float | None  # that, over the base's; None if the base fails
    latency: float  # seconds of one call alone, Python included
    how: str  # "graph", "events" (mfkernels.timing.busy_time) or "clock"


def measured(way: Callable[[], object], base: Callable[[], object], *, rounds: int) -> Measured:
    """`way` next to `base`. On a GPU the device's own time, without Python's; else in turns, by the clock."""
    if torch.cuda.is_available():
        taken = busy_time(way, rounds=3)
        try:
            ratio = taken.seconds / busy_time(base, rounds=3).seconds
        except RuntimeError as error:  # the base has a row of its own, which fails
            print(f"what this is compared with fails: {error}")
            ratio = None
        return Measured(taken.seconds, ratio, latency(way), taken.how)
    times = interleaved_seconds({"way": way, "base": base}, rounds=rounds)
    seconds = statistics.median(times["way"])
    return Measured(seconds, median_ratio(times["way"], times["base"]), seconds, "clock")


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(fn: Callable[[], object]) -> float:
    synchronize()
    start = time.perf_counter()
    fn()
    synchronize()
    return time.perf_counter() - start


def interleaved_seconds(
    fns: Mapping[str, Callable[[], object]], *, rounds: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Times of each callable, taken in turns so that a slow moment of the machine hits all of them alike."""
    for fn in fns.values():
        for _ in range(warmup):
            fn()
    times: dict[str, list[float]] = {name: [] for name in fns}
    for _ in range(rounds):
        for name, fn in fns.items():
            times[name].append(seconds_of(fn))
    return times


def median_ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


def peak_bytes(fn: Callable[[], object]) -> int:
    """Largest number of bytes allocated during `fn` over what was there before it.

    On the CPU it is summed from the allocator's own events in PyTorch's profiler.
    """
    if torch.cuda.is_available():
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@functools.cache
def gemm_flops(dtype: torch.dtype) -> float:
    """The machine's ceiling: FLOP/s of a large square matrix product of random numbers, best of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    n = 8192 if device == "cuda" else 64 if REHEARSAL else 1536
    a, b = torch.randn(2, n, n, device=device, dtype=dtype)
    times = interleaved_seconds({"gemm": lambda: a @ b}, rounds=10, warmup=3)["gemm"]
    return 2 * n**3 / min(times)


@functools.cache
def copy_bytes() -> float:
    """The machine's ceiling: bytes/s (read and written) of a copy far larger than its caches, best of ten."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    a = torch.randn(2**28 if device == "cuda" else 2**10 if REHEARSAL else 2**25, device=device)
    b = torch.empty_like(a)
    times = interleaved_seconds({"copy": lambda: b.copy_(a)}, rounds=10, warmup=3)["copy"]
    return 2 * a.numel() * a.element_size() / min(times)


def _bmm_in_place(self_shape, a_shape, b_shape, *args, out_shape=None, **kwargs) -> int:
    B, n, k = a_shape
    return 2 * B * n * k * b_shape[-1]


def _attention(q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_flop_count(q_shape, k_shape, v_shape)


def _attention_backward(do_shape, q_shape, k_shape, v_shape, *args, out_shape=None, **kwargs) -> int:
    return sdpa_backward_flop_count(do_shape, q_shape, k_shape, v_shape)


def flops_of(fn) -> int:
    """FLOPs of `fn()`, on the CPU or on meta tensors; PyTorch's counter alone misses CPU attention and `baddbmm_`."""
    aten = torch.ops.aten
    more = {
        aten.baddbmm_: _bmm_in_place,
        aten._scaled_dot_product_flash_attention_for_cpu: _attention,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        fn()
    return counter.get_total_flops()
