"""Products, peak memory and time of a callable, as benchmarks and comparisons of methods report them."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from . import _torch


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds_of(fn: Callable[[], object]) -> float:
    """Wall-clock seconds of one call, with the work that it leaves to a GPU."""
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


def peak_bytes(fn: Callable[[], object], device: torch.device | str | None = None) -> int:
    """Largest number of bytes allocated during `fn` over what was there before it.

    On the CPU it is summed from the allocator's own events in PyTorch's profiler.

    Args:
        device: whose memory is meant; None: a GPU's, where there is one.
    """
    on_gpu = torch.cuda.is_available() if device is None else torch.device(device).type == "cuda"
    if on_gpu:
        synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        fn()
        synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        fn()
    profiler: Any = profile.profiler
    events = [e for e in profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


def flops_of(fn: Callable[[], object]) -> int:
    """FLOPs of the products that PyTorch makes in `fn()`; those in kernels of this library are not seen.

    PyTorch's counter alone misses CPU attention and `baddbmm_`.
    """
    more = {
        torch.ops.aten.baddbmm_: _bmm_in_place,
        _torch.attention_cpu: _attention,
        _torch.attention_backward_cpu: _attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=more) as counter:
        fn()
    return int(counter.get_total_flops())


def _bmm_in_place(self_shape: Any, a_shape: Any, b_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    B, n, k = a_shape
    return int(2 * B * n * k * b_shape[-1])


def _attention(q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    return int(sdpa_flop_count(q_shape, k_shape, v_shape))


def _attention_backward(
    do_shape: Any, q_shape: Any, k_shape: Any, v_shape: Any, *args: Any, out_shape: Any = None, **kwargs: Any
) -> int:
    return int(sdpa_backward_flop_count(do_shape, q_shape, k_shape, v_shape))
