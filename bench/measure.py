"""Time, peak memory and FLOPs of a callable."""

from __future__ import annotations

import functools
import os
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from mfkernels.measuring import interleaved_seconds
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


def median_ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))


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
