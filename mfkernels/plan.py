"""Calls of kernels cached by shape: what a function of kernels does is worked out once, and done again from a list.

Such a function allocates, takes views and launches. Between two calls whose tensors agree in shape, strides, dtype and
alignment only addresses differ, so the second needs no more Python than the addresses do.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from . import launch
from ._torch import TorchDispatchMode, is_view, memory_of
from .launch import Launch

F = TypeVar("F", bound=Callable[..., Any])

MAX_PLANS = 4096  # of one function; then they are worked out anew
_PLAIN = (Tensor, torch.nn.Parameter)
_OF_DTYPES = "aten::promote_types"
_ALLOCATES = ("aten::empty", "aten::empty_strided", "aten::empty_like", "aten::new_empty")


_NEW = object()


class View(NamedTuple):
    """A tensor of a result."""

    base: int  # of the buffers
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


class Step(NamedTuple):
    """A launch. `pointers` holds (position among the arguments, base, bytes): inputs first, then buffers."""

    start: Callable[..., None]
    arguments: list[Any]
    pointers: list[tuple[int, int, int]]


class Plan(NamedTuple):
    device: torch.device
    buffers: list[tuple[tuple[int, ...], tuple[int, ...], torch.dtype]]  # size, stride
    steps: list[Step]
    results: list[int | View | None]  # a buffer, or a view of one
    single: bool  # a tensor, not a tuple
    apart: list[tuple[int, int, int]]  # inputs that share memory, and how many bytes lie between them

    def fits(self, addresses: list[int]) -> bool:
        """Whether inputs lie in each other's memory as they did when the plan was made."""
        for i, j, between in self.apart:  # noqa: SIM110 (a generator takes twice as long)
            if addresses[j] - addresses[i] != between:
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
                launch.started(start, arguments)
        out = [
            None if view is None else buffers[view] if isinstance(view, int) else _view(buffers, view)
            for view in self.results
        ]
        return out[0] if self.single else tuple(out)


def _view(buffers: list[Tensor], view: View) -> Tensor:
    return buffers[view.base].as_strided(view.size, view.stride, view.offset)


def planned(run: F) -> F:
    """A function of kernels that is worked out once for each kind of arguments.

    Args:
        run: allocates, takes views, makes launches of Triton (`Launch.run`) and returns a tensor or a tuple of tensors
            and None. What depends on anything but its arguments' shapes, strides, dtypes, devices and alignments, its
            numbers and the launch tables is not for it. Where it does anything else (copies, fills), no plan is made.
    """
    plans: dict[Any, Any] = {}  # of a kind of arguments: a Plan, or None where there is none

    @functools.wraps(run)
    def call(*args: Any, **kwargs: Any) -> Any:
        inputs: list[Tensor] = []
        addresses: list[int] = []
        key: list[Any] = []
        if launch.any_forced() or not _describe(args, inputs, addresses, key):
            return run(*args, **kwargs)
        for name, value in kwargs.items():
            if isinstance(value, (Tensor, dict)):  # a configuration of one's own
                return run(*args, **kwargs)
            key += (name, value)
        kind = tuple(key)
        plan = plans.get(kind, _NEW)
        if plan is None:
            return run(*args, **kwargs)
        if plan is not _NEW:
            return plan.run(addresses) if plan.fits(addresses) else run(*args, **kwargs)
        if len(plans) >= MAX_PLANS:
            plans.clear()
        with _Recorder() as recorder, launch.recorded(recorder.launches):
            out = run(*args, **kwargs)
        plans[kind] = recorder.plan(inputs, out)
        return out

    launch.on_clear(plans.clear)
    return call  # type: ignore[return-value]


def _describe(args: tuple[Any, ...], inputs: list[Tensor], addresses: list[int], key: list[Any]) -> bool:
    """Append the tensors of `args`, their addresses and all that a plan depends on; False where that is unknown."""
    for x in args:
        kind = type(x)
        if kind in _PLAIN:
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
            key.append(x)  # of one place one type
    return True


class _Recorder(TorchDispatchMode):  # type: ignore[misc,valid-type]
    """Sees what a function does beside its launches, and what it launches."""

    def __init__(self) -> None:
        super().__init__()
        self.launches: list[tuple[Launch, Any]] = []
        self.allocated: list[Tensor] = []  # kept, so that no memory is given out twice
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
        first: dict[int, int] = {}  # memory: the first input in it, or the buffer
        apart = []
        for j, x in enumerate(inputs):
            i = first.setdefault(memory_of(x), j)
            if i != j:
                apart.append((i, j, x.data_ptr() - inputs[i].data_ptr()))
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
        return Plan(inputs[0].device, buffers, steps, views, isinstance(out, Tensor), apart)
