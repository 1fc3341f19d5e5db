"""Device time and latency of a call."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import torch

LEAST_CALLS, MOST_CALLS = 20, 400  # back to back, in one measurement

# Whether the capture of a CUDA graph has failed in this process. PyTorch's allocator may then stay in its capturing
# state: memory is not freed, and later captures fail. A long program should continue in a new process.
capture_failed = False


class Timing(NamedTuple):
    """Seconds of one call, and how they were measured: "graph", "events" or "clock"."""

    seconds: float
    how: str


def busy_time(fn: Callable[[], object], *, milliseconds: float = 20.0, rounds: int = 5) -> Timing:
    """How long `fn` keeps the device busy, the median of several rounds.

    On a GPU a round is 20 calls or more, captured into one CUDA graph whose replay is timed with events ("graph"):
    Python's time, which is longer than a small kernel's, is not in it. Where `fn` cannot be captured (it copies to the
    host, or is a CUDA graph already), the calls are made one after the other between two events ("events"): an upper
    bound, because the GPU may have waited for Python. Without a GPU it is the wall clock around each call ("clock").

    Args:
        fn: called a few times first, so that compilation is not timed. Autograd runs a backward on the stream of its
            forward, so a backward alone can be captured only if this function and the forward were called inside one
            `with torch.cuda.stream(...)` block.
        milliseconds: device time of a round, about.
        rounds: how many rounds.
    """
    global capture_failed
    if not torch.cuda.is_available():
        fn()
        return Timing(latency(fn, milliseconds=milliseconds), "clock")
    own = torch.cuda.current_stream()
    stream = torch.cuda.Stream() if own == torch.cuda.default_stream() else own
    stream.wait_stream(own)
    with torch.cuda.stream(stream):
        for _ in range(3):
            fn()
        estimate = _milliseconds(fn, 3) / 3
        calls = min(MOST_CALLS, max(LEAST_CALLS, int(milliseconds / max(estimate, 1e-3))))
        graph, how = torch.cuda.CUDAGraph(), "graph"
        try:
            with torch.cuda.graph(graph, stream=stream):
                for _ in range(calls):
                    fn()
            _milliseconds(graph.replay, 1)
            taken = [_milliseconds(graph.replay, 1) for _ in range(rounds)]
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:
            capture_failed = True
            torch.cuda.synchronize()  # raises if it was another error, which persists
            how = "events"
            taken = [_milliseconds(fn, calls) for _ in range(rounds)]
    own.wait_stream(stream)
    return Timing(1e-3 * statistics.median(taken) / calls, how)


def _milliseconds(fn: Callable[[], object], calls: int) -> float:
    """Between two events, with this number of calls from one to the other."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    for _ in range(calls):
        fn()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end))


def latency(fn: Callable[[], object], *, milliseconds: float = 20.0) -> float:
    """Seconds from calling `fn` with an idle device to the end of its work, the median of at least three calls."""
    on_gpu = torch.cuda.is_available()
    taken: list[float] = []
    while len(taken) < 3 or (sum(taken) < 1e-3 * milliseconds and len(taken) < MOST_CALLS):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        fn()
        if on_gpu:
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - start)
    return statistics.median(taken)
