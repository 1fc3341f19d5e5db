"""Plans: the allocations and launches of a function of kernels, recorded once per cache key and replayed.

Such a function allocates, takes views and launches. Between two calls whose tensors agree in shape, strides, dtype and
alignment only addresses differ, so a replay fills in the addresses and does nothing else in Python.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import launch
from ._torch import TorchDispatchMode, is_view, memory_of
from .calls import PLAIN
from .launch import Launch

F = TypeVar("F", bound=Callable[..., Any])

MAX_PLANS = 4096  # of one function; a full cache is emptied
_ALLOCATES = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")
_OF_DTYPES = "aten::promote_types"  # reads no tensor
_MISSING = object()


class View(NamedTuple):
    """A result that is a view of a buffer."""

    base: int  # index of the buffer
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Step(NamedTuple):
    """A launch. `pointers`: (position of the argument, index of its base, offset in bytes); inputs, then buffers."""

    start: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]


class Plan(NamedTuple):
    device: torch.device
    buffers: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # size, stride
    steps: list[Step]
    results: list[int | View | None]  # index of a buffer, or a view of one
    single: bool  # returns a tensor, not a tuple
    aliases: list[tuple[int, int, int]]  # pairs of inputs in one memory, and their distance in bytes

    def fits(self, addresses: list[int]) -> bool:
        """Whether inputs alias each other as they did when the plan was recorded."""
        for i, j, distance in self.aliases:  # noqa: SIM110 (a generator takes twice as long)
            if addresses[j] - addresses[i] != distance:
                return False
        return True

    def run(self, addresses: list[int]) -> Any:
        device = self.device  # below, torch.empty takes half as long again
        buffers = [
            torch.empty_strided(size, stride, dtype=dtype, device=device) for size, stride, dtype in self.buffers
        ]
        addresses += [x.data_ptr() for x in buffers]
        with launch.on_device(self.device):
            for start, template, pointers in self.steps:
                arguments = template.copy()
                for position, base, offset in pointers:
                    arguments[position] = addresses[base] + offset
                launch.replay(start, arguments)
        out = [
            None if result is None else buffers[result] if isinstance(result, int) else _view(buffers, result)
            for result in self.results
        ]
        return out[0] if self.single else tuple(out)


def _view(buffers: list[Tensor], view: View) -> Tensor:
    return buffers[view.base].as_strided(view.size, view.stride, view.offset)


def planned(run: F) -> F:
    """A function of kernels whose calls are replayed from plans.

    Args:
        run: allocates, takes views, makes launches of Triton (`Launch.run`) and returns a tensor or a tuple of tensors
            and None. It may depend on its arguments' shapes, strides, dtypes, devices and alignments, its numbers and
            the launch tables, and on nothing else. Where it does more (copies, fills), its calls are not replayed.
    """
    plans: dict[tuple[Any, ...], Plan | None] = {}  # None: not to be replayed

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        inputs: list[Tensor] = []
        addresses: list[int] = []
        key: list[Any] = []
        if launch.any_forced() or not _describe(args, inputs, addresses, key):
            return run(*args, **kwargs)
        for name, value in kwargs.items():
            if isinstance(value, (Tensor, dict)):  # a configuration that the caller gives
                return run(*args, **kwargs)
            key += (name, value)
        cache_key = tuple(key)
        plan: Any = plans.get(cache_key, _MISSING)
        if plan is None:
            return run(*args, **kwargs)
        if plan is not _MISSING:
            return plan.run(addresses) if plan.fits(addresses) else run(*args, **kwargs)
        if len(plans) >= MAX_PLANS:
            plans.clear()
        with _Recorder() as recorder, launch.recorded(recorder.launches):
            out = run(*args, **kwargs)
        plans[cache_key] = recorder.plan(inputs, out)
        return out

    launch.on_clear(plans.clear)
    return call  # type: ignore[return-value]


def _describe(args: tuple[Any, ...], inputs: list[Tensor], addresses: list[int], key: list[Any]) -> bool:
    """Append the tensors of `args`, their addresses and what a plan depends on; False for a tensor subclass."""
    for x in args:
        if type(x) in PLAIN:
            if not inputs:
                key.append(x.device)
            inputs.append(x)
            address = x.data_ptr()
            addresses.append(address)
            key += (x.shape, x.is_contiguous() or x.stride(), x.dtype, address % 16)
        elif isinstance(x, tuple):
            key.append(len(x))
            if not _describe(x, inputs, addresses, key):
                return False
        elif isinstance(x, Tensor):
            return False
        else:
            key.append(x)  # an argument has one type at every call
    return True


class _Recorder(TorchDispatchMode):  # type: ignore[misc,valid-type]
    """Records the launches and allocations of a function, and whether it does anything else."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Launch, Any]] = []
        self.allocated: list[Tensor] = []  # kept alive, so that no memory is reused
        self.other = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.name().split(".")[0]
        if name in _ALLOCATES:
            self.allocated.append(out)
        elif name != _OF_DTYPES and not is_view(func):
            self.other = True
        return out

    def plan(self, inputs: Sequence[Tensor], out: Any) -> Plan | None:
        results = (out,) if isinstance(out, Tensor) else out
        launched = bool(self.launches) and all(compiled is not None for _, compiled in self.launches)
        if self.other or not launched or not all(x.is_contiguous() for x in self.allocated):
            return None
        first: dict[int, int] = {}  # by memory: index of the first input in it, or of the buffer
        aliases = []
        for j, x in enumerate(inputs):
            i = first.setdefault(memory_of(x), j)
            if i != j:
                aliases.append((i, j, x.data_ptr() - inputs[i].data_ptr()))
        for j, x in enumerate(self.allocated, len(inputs)):
            first[memory_of(x)] = j
        bases = [*inputs, *self.allocated]
        steps = []
        for made, compiled in self.launches:
            values = made.values()
            pointers = []
            for position, x in enumerate(values):
                if isinstance(x, Tensor):
                    base = first[memory_of(x)]
                    pointers.append((position, base, x.data_ptr() - bases[base].data_ptr()))
                    values[position] = 0  # a plan that held its first call's tensors would keep them, and their tape
            steps.append(Step(compiled[(*made.grid(made.config), 1, 1)[:3]], values, pointers))
        views: list[int | View | None] = []
        for x in results:
            if x is None:
                views.append(None)
                continue
            buffer = first.get(memory_of(x), -1) - len(inputs)
            if buffer < 0 or x.dtype != self.allocated[buffer].dtype:
                return None
            whole = x.shape == self.allocated[buffer].shape and x.is_contiguous()
            view = View(buffer, tuple(x.shape), x.stride(), int(x.storage_offset()))
            views.append(buffer if whole else view)
        buffers = [(tuple(x.shape), x.stride(), x.dtype) for x in self.allocated]
        return Plan(inputs[0].device, buffers, steps, views, isinstance(out, Tensor), aliases)
