"""CUDA graphs without a GPU: what one cannot hold, and one that is recorded and replayed on a CPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mfkernels._torch import schema_of

aten = torch.ops.aten
INDEXING = (aten.index, aten.index_put, aten.index_put_)
READS = {torch.Tag.data_dependent_output: "reads a value", torch.Tag.dynamic_output_shape: "has a shape of its values"}


class NotRecordable(AssertionError):
    """A step has something that a CUDA graph cannot hold, or would hold for ever."""


class Recordable(TorchDispatchMode):
    """Context in which a read on the host, a shape that depends on values, a random draw, a tensor made of Python's
    numbers and, of a step on another device, any tensor on the CPU is an error, in the backward too.

    draws: let random draws pass, which a CUDA graph makes anew from the seed of PyTorch's generator.
    """

    def __init__(self, device: str = "cpu", *, draws: bool = False) -> None:
        super().__init__()
        self.device, self.draws = torch.device(device), draws

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        indices = _tensors(args[1]) if func.overloadpacket in INDEXING else []
        by_place = bool(indices) and all(a.dtype in (torch.int32, torch.int64) for a in indices)
        for tag, words in READS.items():
            if tag in func.tags and not by_place:
                raise NotRecordable(f"{func}: {words}")
        if indices and not by_place:  # by a mask
            raise NotRecordable(f"{func}: has a shape of its values")
        given = _given(func, args, kwargs)
        seeded = torch.Tag.nondeterministic_seeded in func.tags and given.get("dropout_p", given.get("p")) != 0.0
        if seeded and not self.draws:
            raise NotRecordable(f"{func}: draws")
        if func is aten.lift_fresh.default:
            raise NotRecordable(f"{func}: a tensor of Python's numbers")
        out = func(*args, **kwargs)
        for a in _tensors((args, kwargs, out)):
            if a.device.type != self.device.type:
                raise NotRecordable(f"{func}: a tensor on {a.device}")
        return out


def _given(func: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """Every argument of a call by its name; those that were left out have their defaults."""
    arguments = schema_of(func).arguments
    defaults = {a.name: a.default_value for a in arguments if a.has_default_value()}
    return {**defaults, **dict(zip((a.name for a in arguments), args, strict=False)), **kwargs}


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


class Recording(TorchDispatchMode):
    """`graphs.CudaGraph` on a CPU: the operators of a step are taken down, and executed again on the same memory with
    the same numbers, without any of the step's Python."""

    draws = False  # whether the step may

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.made: set[int] = set()
        self.before: dict[int, tuple[torch.UntypedStorage, torch.UntypedStorage]] = {}
        self.replays = 0

    def warm_up(self, fn: Callable[[], Tensor]) -> Tensor:
        return fn()

    def record(self, fn: Callable[[], Tensor]) -> Tensor:
        state = torch.get_rng_state()
        with self, Recordable(draws=self.draws):
            result = fn()
        torch.set_rng_state(state)  # a recording does nothing, and so draws nothing
        for memory, saved in self.before.values():
            memory.copy_(saved)
        return result

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = _given(func, args, kwargs)
        for argument in schema_of(func).arguments:
            if argument.alias_info is not None and argument.alias_info.is_write:
                for a in _tensors(given.get(argument.name)):
                    memory = a.untyped_storage()
                    if _address(a) not in self.made:
                        self.before.setdefault(_address(a), (memory, memory.clone()))
        out = func(*args, **kwargs)
        known = {_address(a) for a in _tensors((args, kwargs))}
        self.made |= {_address(a) for a in _tensors(out)} - known
        self.calls.append((func, args, kwargs, _tensors(out)))
        return out

    def replay(self) -> None:
        self.replays += 1
        with torch._C._AutoDispatchBelowAutograd():
            for func, args, kwargs, results in self.calls:
                for recorded, new in zip(results, _tensors(func(*args, **kwargs)), strict=True):
                    if _address(recorded) != _address(new):  # neither a view nor in place
                        recorded.copy_(new)


def _address(a: Tensor) -> int:
    return a.untyped_storage().data_ptr()
