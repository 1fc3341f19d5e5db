"""Times are taken by the way that they say, and an error of the call is the caller's."""

import time
from contextlib import nullcontext

import pytest
import torch

from mfkernels import timing
from mfkernels.timing import busy_time, latency


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_without_a_gpu_it_is_the_clock():
    calls = []
    taken = busy_time(lambda: calls.append(time.sleep(0.002)), milliseconds=1)
    assert taken.how == "clock"
    assert taken.seconds >= 0.002
    assert len(calls) >= 4
    assert latency(lambda: time.sleep(0.002), milliseconds=1) >= 0.002


def test_what_a_call_raises_is_raised():
    def fails():
        raise ValueError("of the call")

    for measure in (busy_time, latency):
        with pytest.raises(ValueError, match="of the call"):
            measure(fails)


class Stream:
    def wait_stream(self, other):
        pass


class Event:
    """A clock that counts calls: one millisecond each."""

    now = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self):
        self.at = Event.now

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return end.at - self.at


class Graph:
    calls = 0

    def replay(self):
        Event.now += 0.25 * self.calls  # a replay spends no time in Python


class Recording:
    def __init__(self, graph, stream):
        self.graph = graph

    def __enter__(self):
        self.start = Event.now

    def __exit__(self, *error):
        self.graph.calls, Event.now = Event.now - self.start, self.start


@pytest.fixture
def gpu(monkeypatch):
    own = Stream()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for name, value in (
        ("current_stream", lambda: own),
        ("default_stream", lambda: own),
        ("Stream", Stream),
        ("stream", lambda stream: nullcontext()),
        ("synchronize", lambda: None),
        ("Event", Event),
        ("CUDAGraph", Graph),
        ("graph", Recording),
    ):
        monkeypatch.setattr(torch.cuda, name, value)


def call():
    Event.now += 1.0


@pytest.mark.parametrize("milliseconds", [1.0, 100.0])
def test_a_replay_is_timed_and_divided_by_its_calls(gpu, milliseconds):
    assert busy_time(call, milliseconds=milliseconds) == (0.25e-3, "graph")


def test_what_cannot_be_recorded_is_timed_call_after_call(gpu, monkeypatch):
    class Refuses(Recording):
        def __enter__(self):
            raise RuntimeError("operation not permitted when stream is capturing")

    monkeypatch.setattr(torch.cuda, "graph", Refuses)
    assert busy_time(call) == (1e-3, "events")

    class Full(Recording):
        def __enter__(self):
            raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(torch.cuda, "graph", Full)
    with pytest.raises(torch.OutOfMemoryError):
        busy_time(call)
    assert timing.LEAST_CALLS >= 20
