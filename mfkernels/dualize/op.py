from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from .. import _torch
from .._torch import tree_flatten, tree_unflatten
from ..dual import Dual, check_tangent, is_dual_aware, map_output, unshared, unwrapped
from ..forward_mode import carries_tangent
from .call import can_have_tangent
from .report import Report, refused
from .tensor import DualPass, DualTensor, primal_on_tape

M = TypeVar("M", bound=nn.Module)


def dualize(model: M, *, report: bool = False) -> M:
    """An ordinary module as one that takes `Dual`s: value and derivative in one pass, only the value on the tape.

    The module's own Python code runs, on tensors that carry tangents. Every operator of PyTorch is executed as without
    `dualize`, so values, gradients, saved tensors and random numbers are those of the module. The tangent of its result
    is computed under no_grad, only for the rows that have one: by a rule for the operators that networks spend their
    time on, by `torch.func.jvp` for all others. See README.md beside this file.

    Args:
        model: a module whose samples do not depend on each other, with the batch first in what it takes and gives.
            Its tensor arguments, positional, by keyword or in any pytree, may be `Dual`s.
        report: keep count of the operations and the time their tangents take, in the attribute `dual_report`.

    Returns:
        A module of the same class, parameters, buffers and submodules (shared, names unchanged) that `mfkernels.jvp`,
        DDP, `fully_shard`, checkpoints and `torch.compile` take as a dual-aware one. On plain tensors it is `model`.

    Raises:
        TypeError: `model` is no module.
        ValueError: `model` is wrapped in DDP or torch.compile; those go around what `dualize` returns.
        NotImplementedError: by the call, with the user's line: an operation mixes batch rows, takes a number out of a
            tensor, or has no forward-mode rule.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    if unwrapped(model) is not model:
        raise ValueError(
            f"model: expected the network itself, got it wrapped in {type(model).__name__}; dualize it first, then wrap"
        )
    if is_dual_aware(model):
        return model
    dual = _rebuild(type(model))
    # the same tables of parameters, buffers, submodules and hooks, not copies of them
    dual.__dict__.update(model.__dict__, dual_report=Report() if report else None, _dualized_places=_places(model))
    return dual


@cache
def _dualized_class(base: type) -> type:
    names = {"__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (_Dualized, base), names)


def _rebuild(base: type) -> Any:
    _prepare_to_compile()
    return object.__new__(_dualized_class(base))


class _Dualized(nn.Module):
    __dual_aware__ = True
    __dualized__ = True
    dual_report: Report | None
    _dualized_places: tuple[_Place, ...]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.compiler.is_compiling():
            return _dual_call(self, args, kwargs)
        if _holds_dual((args, kwargs)):
            return _compiled_call(self, args, kwargs)
        return self._dualized_call(*args, **kwargs)

    def _dualized_call(self, *args: Any, **kwargs: Any) -> Any:
        """The module's own call, hooks included."""
        return super().__call__(*args, **kwargs)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the user's class; this one is made again from it."""
        base = next(c for c in type(self).__mro__ if not issubclass(c, _Dualized))
        return _rebuild, (base,), self.__getstate__() if hasattr(self, "__getstate__") else self.__dict__


# --------------------------------------------------------------------------------------------------------------- a pass


def _is_dual(x: Any) -> bool:
    return isinstance(x, Dual)


def _dual_call(module: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """`module(*args, **kwargs)`, its own call, with `Dual`s carried through it."""
    leaves, spec = tree_flatten((args, dict(kwargs)), is_leaf=_is_dual)
    duals = [x for x in leaves if _is_dual(x)]
    batch, active = _check(duals)
    # copies, as the module may write into its inputs
    leaves = [Dual._make(a if a is None else unshared(a) for a in x) if _is_dual(x) else x for x in leaves]
    if not active:
        args, kwargs = tree_unflatten([x.primal if _is_dual(x) else x for x in leaves], spec)
        out = module._dualized_call(*args, **kwargs)
        return map_output(lambda o: Dual(o) if can_have_tangent(o) else o, out) if duals else out
    report = module.dual_report
    start = time.perf_counter()
    run = DualPass(batch, active, report)
    # TorchScript's optimised graphs detach their inputs; this setting is of the thread
    with _compiled_runs_eagerly(), torch.jit.optimized_execution(False), run:
        args, kwargs = tree_unflatten([run.enter(x) if _is_dual(x) else x for x in leaves], spec)
        try:
            out = map_output(lambda o: _leave(o, run), module._dualized_call(*args, **kwargs))
        except RuntimeError as error:
            if "saved tensor hooks" not in str(error) or isinstance(error, NotImplementedError):
                raise
            why = "torch.func.grad and its kin inside the module would ignore tangents"
            raise refused("torch.func", f"{why} ({str(error).splitlines()[0]})", error) from error
        finally:
            _release_buffers(module, run)
    if report is not None:
        report.seconds += time.perf_counter() - start
    return out


_lock, _passes, _stance = threading.Lock(), 0, ExitStack()


@contextmanager
def _compiled_runs_eagerly() -> Iterator[None]:
    """While any pass runs, compiled functions run eagerly: compiled graphs would drop the tangents.

    All threads share this setting: the first pass sets it and the last one restores it.
    """
    global _passes
    with _lock:
        _passes += 1
        if _passes == 1 and _torch.compiler_loaded():
            _stance.enter_context(torch.compiler.set_stance("force_eager"))
    try:
        yield
    finally:
        with _lock:
            _passes -= 1
            if _passes == 0:
                _stance.close()


def _release_buffers(module: nn.Module, run: DualPass) -> None:
    """Replace DualTensors that the module assigned to its buffers by their primals."""
    if not run.has_live_tensors():
        return
    for part in module.modules():
        for name, buffer in list(part.named_buffers(recurse=False)):
            if isinstance(buffer, DualTensor):
                setattr(part, name, primal_on_tape(buffer))


def _check(duals: list[Dual]) -> tuple[int, int]:
    """Batch size and the most rows that carry a tangent."""
    batch: int | None = None
    for x in duals:
        if not isinstance(x.primal, Tensor):
            raise TypeError(f"primal: expected a tensor in a Dual, got {type(x.primal).__name__}")
        if x.tangent is not None:
            check_tangent("tangent", x.primal, x.tangent)
        rows = x.primal.shape[0] if x.primal.ndim else batch
        if batch not in (None, rows):
            raise ValueError(f"primal: expected the same batch in every Dual, got {rows} rows and {batch}")
        batch = rows
        if any(map(carries_tangent, x)):
            raise NotImplementedError(
                "dualize: forward-mode tangents (torch.func.jvp, forward_ad), another dual pass and Duals cannot be "
                "mixed; a second derivative needs torch.func.jvp of the module itself"
            )
    return batch or 0, max((x.rows for x in duals), default=0)


def _leave(o: Any, run: DualPass) -> Any:
    slot = run.slot(o) if isinstance(o, Tensor) else None
    if slot is None:
        return primal_on_tape(o)
    t, rows = slot.tangent, slot.rows
    axis = 0 if rows is None else rows.axis
    if axis != 0 or o.ndim == 0 or (rows is None and o.shape[0] % run.batch):
        where = f" with them in dimension {axis}" if axis else ""
        raise ValueError(
            f"output: expected its {run.batch} samples in dimension 0, as a Dual has them, got shape {tuple(o.shape)}"
            f"{where}; let the module return a result per sample"
        )
    if rows is not None and rows.outer != 1:  # several batches: the rows with tangents are not the first
        t, rows = rows.fill(t), None
    if rows is None and o.shape[0] == run.batch:
        t = t[: run.active_rows]
    return Dual(primal_on_tape(o), t.detach())


# -------------------------------------------------------------------------------------------------------- torch.compile
# Dynamo does not trace a pass: it puts one call into its graph, and AOTAutograd traces the operators that the pass
# executes, of primal and tangent, so that the compiler sees one flat graph of both.

# The call can take and return tensors, lists, tuples and dicts, but no named tuples and no None.
_DUAL, _NONE = "mfkernels.Dual", "mfkernels.None"


def _encoded(x: Any) -> Any:
    if isinstance(x, Dual):
        return {_DUAL: [x.primal] if x.tangent is None else [x.primal, x.tangent]}
    if x is None:
        return {_NONE: []}
    if isinstance(x, dict):
        return {k: _encoded(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)):
        parts = [_encoded(v) for v in x]
        return tuple(parts) if type(x) is tuple else parts
    return x


def _decoded(x: Any) -> Any:
    if isinstance(x, dict):
        if _NONE in x:
            return None
        return Dual(*x[_DUAL]) if _DUAL in x else {k: _decoded(v) for k, v in x.items()}
    return type(x)([_decoded(v) for v in x]) if type(x) in (list, tuple) else x


def _holds_dual(x: Any) -> bool:
    parts = x.values() if isinstance(x, dict) else x if isinstance(x, (list, tuple)) else ()
    return isinstance(x, Dual) or any(map(_holds_dual, parts))


_Place = tuple[str, str, Any]  # submodule, attribute, key in it or None


def _places(module: nn.Module) -> tuple[_Place, ...]:
    """The attributes that must be inputs of the compiled call, besides the module's parameters and buffers.

    Tensors, also in a list or dict, as tables of positions often are: as constants of the graph they could not be
    traced in the backward. Numbers, flags and strings, such as `training`: as inputs they make Dynamo recompile when
    they change, or become inputs of the graph.
    """
    found: list[_Place] = []
    for path, part in module.named_modules():
        for name, value in part.__dict__.items():
            if not name.startswith("_"):
                items = value.items() if type(value) is dict else enumerate(value) if type(value) is list else ()
                found += [(path, name, None)] if isinstance(value, (Tensor, bool, int, float, str)) else []
                found += [(path, name, key) for key, x in items if isinstance(x, Tensor)]
    return tuple(found)


def _get(module: nn.Module, place: _Place) -> Any:
    """The attribute or its entry; None if it is gone."""
    path, name, key = place
    value = getattr(module.get_submodule(path), name, None)
    if key is None:
        return value
    if isinstance(value, dict):
        return value.get(key)
    return value[key] if isinstance(value, list) and key < len(value) else None


def _put(module: nn.Module, places: list[_Place], values: list[Any]) -> list[Any]:
    """Store values in these places; returns the previous ones."""
    before = []
    for (path, name, key), x in zip(places, values, strict=True):
        table = module.get_submodule(path).__dict__
        table, key = (table, name) if key is None else (table[name], key)
        before.append(table[key])
        table[key] = x
    return before


def _run_with(module: Any, held: list[int], values: Any, args: Any, kwargs: Any) -> Any:
    places = [module._dualized_places[i] for i in held]
    buffers, before = dict(module.named_buffers()), _put(module, places, values)
    try:
        out = _encoded(_dual_call(module, tuple(_decoded(args)), _decoded(kwargs)))
    finally:
        _put(module, places, before)
    assigned = [name for name, x in module.named_buffers() if buffers.get(name) is not x]
    if assigned:
        raise NotImplementedError(
            f"dualize: the forward assigns the buffer {assigned[0]}, which a compiled graph would not do again; write "
            "into it in place (copy_)"
        )
    return out


_traced: Any = None


def _prepare_to_compile() -> None:
    """Make `_traced`, which cannot be done while Dynamo traces; not at import, as Dynamo takes a second to load."""
    global _traced
    if _traced is None:
        _traced = _torch.nonstrict_trace(_run_with)


def _compiled_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    values = [_get(module, place) for place in module._dualized_places]
    held = [i for i, x in enumerate(values) if x is not None]
    return _decoded(_traced(module, held, [values[i] for i in held], _encoded(args), _encoded(kwargs)))
