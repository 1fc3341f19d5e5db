"""The tensor that carries its tangent through a module that knows nothing of it."""

from __future__ import annotations

import threading
import time
import types
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from ..dual import Dual
from ..scaled_dot_product_attention import scaled_dot_product_attention
from . import names
from .call import Call, Out, Slot, has_tangent
from .report import Report
from .rows import MixesRows, Rows, Untracked
from .rules import rule_for
from .where import user_line

_plain = torch._C.DisableTorchFunctionSubclass
_is_alias: Callable[[Tensor, Tensor], bool] = torch._C._is_alias_of  # type: ignore[attr-defined]


class _Cell:
    """What the aliases of one piece of memory share: their tangents alias each other as their primals do.

    version: of the primal's memory when the tangents were last right.
    lent: the tangent's memory also serves a tensor that is no alias of this one, so it must not be written to.
    """

    __slots__ = ("lent", "version")

    def __init__(self, version: int, lent: bool = False) -> None:
        self.version, self.lent = version, lent


class Batch(NamedTuple):
    """One dual pass: its samples, how many of them (the first) carry tangents, and who counts."""

    size: int
    active: int
    report: Report | None


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version


class DualTensor(Tensor):
    """A primal, on the tape as ever, and the tangent of some of its rows. To its user, a tensor."""

    _primal: Tensor
    _tangent: Tensor
    _rows: Rows | None
    _cell: _Cell
    _batch: Batch

    @staticmethod
    def make(primal: Tensor, tangent: Tensor, rows: Rows | None, batch: Batch) -> DualTensor:
        # the wrapper is what the user's module holds and the tape never sees: the tangent goes when the module lets go
        x = Tensor._make_wrapper_subclass(DualTensor, primal.shape, dtype=primal.dtype, device=primal.device)
        x._primal, x._tangent, x._rows, x._batch = primal, tangent, rows, batch
        x._cell = _Cell(_version(primal))
        return x

    # what modules ask most often, without a dispatch
    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self._primal.shape

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._primal.dtype

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._primal.device

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return self._primal.ndim

    @property
    def requires_grad(self) -> bool:
        return self._primal.requires_grad

    @requires_grad.setter
    def requires_grad(self, value: bool) -> None:
        self._primal.requires_grad = value

    @property
    def grad_fn(self) -> Any:  # type: ignore[override]
        return self._primal.grad_fn

    def __hash__(self) -> int:
        return id(self)

    def __iter__(self) -> Any:
        return iter(self.unbind(0))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        return _dispatch(func, types, args, kwargs or {})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        refusal = NotImplementedError(
            f"dualize: {func} met a tensor with a tangent in compiled or C++ code (TorchScript, torch.func inside the "
            f"module, an extension), where dualize cannot follow; call its Python original{user_line()}"
        )
        refusals.first = refusals.first or refusal
        raise refusal


class _Refusals(threading.local):
    """What was refused below Python in this thread's dual pass: the message may be lost on its way up."""

    first: NotImplementedError | None = None


refusals = _Refusals()


# ------------------------------------------------------------------------------------------------------------- dispatch


def unwrapped(x: Any) -> Any:
    """The primals of a pytree's `DualTensor`s."""
    return tree_map(lambda a: a._primal if isinstance(a, DualTensor) else a, x)


def _slot(x: DualTensor) -> Slot:
    if not torch.compiler.is_compiling() and x._cell.version != _version(x._primal):
        raise NotImplementedError(
            "dualize: this tensor was changed in place through another view of it, and its tangent could not follow; "
            f"clone() before writing, or write out of place{user_line()}"
        )
    return Slot(x._primal, x._tangent, x._rows)


def _mapped(fn: Callable[[DualTensor], Any], x: Any) -> Any:
    if isinstance(x, DualTensor):
        return fn(x)
    if type(x) in (list, tuple):
        return type(x)(_mapped(fn, y) for y in x)
    return x


def _duals(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> list[DualTensor]:
    found: list[DualTensor] = []
    _mapped(found.append, (*args, *kwargs.values()))
    return found


def _primal_of(x: DualTensor) -> Tensor:
    return x._primal


def refused(name: str, why: str) -> NotImplementedError:
    return NotImplementedError(f"dualize: {name}: {why}{user_line()}")


_IMAGE_UNFOLD = {F.unfold: "unfold_image"}


def _dispatch(func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    name = _IMAGE_UNFOLD.get(func) or names.name_of(func)
    if name in names.REFUSED:
        raise refused(name, names.REFUSED[name])
    if name in names.INSPECT or (name.startswith(("get:", "set:")) and name not in _DIFFERENTIABLE_ATTRIBUTES):
        return _inspect(func, args, kwargs)
    if kwargs.get("out") is not None:
        raise refused(name, "out= is not supported; use the result it returns")
    body = _undispatched(func) if name not in _AS_A_WHOLE else None
    if body is not None:
        return body(*args, **kwargs)  # PyTorch's own Python, of which each call comes back here
    if name == "dropout" or name == "dropout_":
        return _dropout(name, args, kwargs)
    if not args and "input" in kwargs:
        args, kwargs = (kwargs["input"],), {k: v for k, v in kwargs.items() if k != "input"}
    duals = _duals(args, kwargs)
    if not duals:
        with _plain():
            return func(*args, **kwargs)
    batch = duals[0]._batch
    report = batch.report
    call = Call(func, name, _mapped(_slot, args), {k: _mapped(_slot, v) for k, v in kwargs.items()})
    if name == "batch_norm" and call.arg(5, "training", False):
        raise refused(
            "batch_norm",
            "mixes batch rows (batch statistics in training mode), so no sample has its own derivative; use eval() "
            "or another norm",
        )
    if func is scaled_dot_product_attention:
        fused = _fused_attention(call, batch)
        if fused is not None:
            return fused
    if _is_in_place(name, kwargs):
        return _in_place(call, args, kwargs, batch)
    # somebody else's tensor (a quantised weight) keeps its own say
    with _plain() if all(t is DualTensor for t in types) else nullcontext():
        p_args, p_kwargs = _mapped(_primal_of, args), {k: _mapped(_primal_of, v) for k, v in kwargs.items()}
        if name in names.RANDOM or (name == "scaled_dot_product_attention" and call.arg(4, "dropout_p", 0.0) > 0):
            return _random(call, p_args, p_kwargs, batch)
        out = func(*p_args, **p_kwargs)
        leaves = [out] if isinstance(out, Tensor) else [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        if not any(has_tangent(x) for x in leaves):
            return out
        start = time.perf_counter() if report else 0.0
        outs = _tangents(call, out, batch)
    result = _wrap(out, outs, duals, batch)
    if report:
        report.add(call, time.perf_counter() - start)
    return result


_DIFFERENTIABLE_ATTRIBUTES = frozenset(["get:T", "get:mT", "get:H", "get:mH", "get:real", "get:imag", "get:data"])

# Python functions of PyTorch that are one operation to us.
_AS_A_WHOLE = (
    names.BATCH_FIRST
    | names.ELEMENTWISE
    | frozenset(names.ALONG)
    | names.SPLIT
    | names.RANDOM
    | names.CAST
    | names.RESHAPE
    | frozenset(["einsum", "layer_norm", "rms_norm", "dropout", "batch_norm", "broadcast_tensors", "cat", "stack"])
    | frozenset(["expand", "scaled_dot_product_attention", "getitem", "setitem_", "repeat", "tile"])
) - frozenset(["norm", "local_response_norm"])


@lru_cache(maxsize=1024)
def _undispatched(func: Callable[..., Any]) -> Callable[..., Any] | None:
    """The body of a function that PyTorch wrote in Python, without its own look for overrides; None for others."""
    if not isinstance(func, types.FunctionType) or not func.__module__.startswith("torch"):
        return None
    checks = [name for name in func.__code__.co_names if name.startswith("has_torch_function")]
    if not checks:
        return None
    scope = {**func.__globals__, **dict.fromkeys(checks, lambda *_: False)}
    body = types.FunctionType(func.__code__, scope, func.__name__, func.__defaults__, func.__closure__)
    body.__kwdefaults__ = func.__kwdefaults__
    return body


def _fused_attention(call: Call, batch: Batch) -> DualTensor | None:
    """This package's own attention, value and tangent in one kernel; None where the batch is not in front."""
    rows = call.slots()[0].rows
    if rows is None or rows.axis != 0 or rows.outer != 1 or any(x.rows != rows for x in call.slots()):
        return None
    with _plain():
        duals = call.map(lambda x: Dual(x.primal, x.tangent) if isinstance(x, Slot) else x)
        out: Any = scaled_dot_product_attention(*duals.args, **duals.kwargs)
    return DualTensor.make(out.primal, out.tangent, rows, batch)


def _inspect(func: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    with _plain():
        out = func(*_mapped(_primal_of, args), **{k: _mapped(_primal_of, v) for k, v in kwargs.items()})
    return args[0] if isinstance(args[0], DualTensor) and out is args[0]._primal else out


def _is_in_place(name: str, kwargs: Mapping[str, Any]) -> bool:
    return (name.endswith("_") and not name.endswith("__")) or kwargs.get("inplace") is True


def _tangents(call: Call, out: Any, batch: Batch) -> list[Out]:
    """The rule's answer; where the batch cannot be followed, its answer for zero tangent rows filled in."""
    rule = rule_for(call)
    with torch.no_grad():
        try:
            try:
                outs = rule(call, out)
                return [_found_again(o, batch) for o in outs] if call.name in _PLACES_ROWS else outs
            except Untracked:
                if batch.report:
                    batch.report.filled(call)
                filled = call.dense()
                outs = rule(filled, out)
                call.through_jvp = filled.through_jvp
                return [_found_again(o, batch) for o in outs]
        except Untracked as error:
            raise refused(call.name, "its tangent cannot be followed") from error
        except MixesRows as error:
            raise refused(call.name, f"mixes batch rows ({error}), so no sample has a derivative of its own") from error
        except (NotImplementedError, RuntimeError) as error:
            text = str(error)
            if "forward AD" not in text and "jvp" not in text:
                raise
            raise refused(call.name, f"has no forward-mode (JVP) rule in PyTorch: {text.splitlines()[0]}") from error


# After these a tangent of all rows may have become one of the first rows alone.
_PLACES_ROWS = frozenset(["setitem_", "copy_", "cat", "stack", "index_put_", "index_put", "index_copy_"])


def _found_again(o: Out, batch: Batch) -> Out:
    """A tangent of all rows as one of the first rows, where it is zero on the others."""
    t, rows = o
    if t is None or rows is not None or t.ndim == 0 or t.shape[0] != batch.size or batch.size == 1:
        return o
    if batch.active < batch.size and (torch.compiler.is_compiling() or bool(t[batch.active :].any())):
        return o
    return Out(t[: batch.active], Rows(0, 1, batch.size, 1, batch.active))


def _wrap(out: Any, outs: list[Out], duals: list[DualTensor], batch: Batch) -> Any:
    given = iter(outs)

    def one(p: Any) -> Any:
        if not has_tangent(p):
            return p
        t, rows = next(given)
        if t is None:
            return p
        for x in duals:
            if p is x._primal:
                return x  # nothing was done (contiguous(), to() …)
        t = t.detach() if t.requires_grad else t
        y = DualTensor.make(p, t if t.dtype == p.dtype else t.to(p.dtype), rows, batch)
        for x in duals:
            if _is_alias(y._tangent, x._tangent):
                if _is_alias(p, x._primal):
                    y._cell = x._cell
                else:
                    x._cell.lent = y._cell.lent = True
                break
        return y

    if isinstance(out, Tensor):
        return one(out)
    if isinstance(out, tuple) and hasattr(out, "_fields") and not isinstance(out, Dual):
        return type(out)(*map(one, out))
    if isinstance(out, (tuple, list)):
        if type(out) in (tuple, list):
            return type(out)(map(one, out))
        return type(out)(list(map(one, out)))  # torch.return_types take one sequence
    return tree_map(one, out)


# ------------------------------------------------------------------------------------------------------------- in place


_DRAWS = frozenset(["random_", "normal_", "uniform_", "bernoulli_", "exponential_", "log_normal_", "cauchy_"])


def _in_place(call: Call, args: tuple[Any, ...], kwargs: Mapping[str, Any], batch: Batch) -> Any:
    """Tangent first (it needs the old primal), then the primal, then both are where the caller expects them."""
    target = args[0]
    report = batch.report
    start = time.perf_counter() if report else 0.0
    if not isinstance(target, DualTensor) and call.name in _DRAWS:
        raise refused(call.name, "the parameters of a distribution cannot carry a tangent")
    with _plain():
        outside = Call(call.func, call.name, call.args, {k: v for k, v in call.kwargs.items() if k != "inplace"})
        p_args, p_kwargs = _mapped(_primal_of, args), {k: _mapped(_primal_of, v) for k, v in kwargs.items()}
        t: Tensor | None = None
        rows: Rows | None = None
        if call.name in _DRAWS or call.name == "zero_":
            t, rows = torch.zeros_like(target._tangent), target._rows
        elif has_tangent(p_args[0]):
            ((t, rows),) = _tangents(outside, p_args[0], batch)
        # an operation that fails leaves the tensor as it was
        out = call.func(*p_args, **p_kwargs)
        if t is not None:
            t = t.to(p_args[0].dtype)
            if t is target or any(_is_alias(t, x._tangent) for x in _duals(args, kwargs)):
                t = t.clone()
    if t is None:
        return out if out is not p_args[0] else target
    if isinstance(target, DualTensor):
        _store(target, t, rows)
    else:
        _adopt(target, t, rows, batch, call.name)
    if report:
        report.add(outside, time.perf_counter() - start)
    return target if out is not None else None


def _store(x: DualTensor, t: Tensor, rows: Rows | None) -> None:
    """Make `t` the tangent of `x`, whose primal has just been written to."""
    compiling = torch.compiler.is_compiling()
    writable = not x._cell.lent and rows == x._rows and torch._debug_has_internal_overlap(x._tangent) != 1
    if writable:
        with torch.no_grad(), _plain():
            x._tangent.copy_(t)  # its aliases see it too, as they see the primal's change
    else:
        x._tangent, x._rows, x._cell = t, rows, _Cell(0)
    if not compiling:
        x._cell.version = _version(x._primal)


def _adopt(x: Tensor, t: Tensor, rows: Rows | None, batch: Batch, name: str) -> None:
    """A plain tensor that was written to with tangents becomes a `DualTensor`, under the name its user knows."""
    if x._is_view():
        raise refused(
            name,
            "a value with a tangent was written into a view of a tensor that has none; write into that tensor itself "
            "(x[..., :n] = y), or build the result with torch.cat or torch.stack",
        )
    if isinstance(x, torch.nn.Parameter) or type(x) is not Tensor:
        raise refused(name, f"a value with a tangent was written into a {type(x).__name__}")
    dual = DualTensor.make(x, t, rows, batch)
    try:
        torch.utils.swap_tensors(x, dual)
    except RuntimeError as error:
        raise refused(
            name, "a value with a tangent was written into a tensor that is in use elsewhere; write into a new one"
        ) from error
    # the two objects have changed places: `dual` is the plain tensor now
    x._primal = dual  # type: ignore[attr-defined]
    x._cell = _Cell(_version(dual))  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------------------------- random


def _dropout(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """F.dropout, one draw for primal and tangent; the primal's arithmetic is PyTorch's own, bit for bit."""
    bound = dict(zip(("input", "p", "training", "inplace"), args, strict=False)) | dict(kwargs)
    x, p = bound["input"], bound.get("p", 0.5)
    training, inplace = bound.get("training", bound.get("train", True)), bound.get("inplace", False) or name[-1] == "_"
    if not training or p == 0.0:
        return x
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"p: expected a dropout probability in [0, 1], got {p}")
    if inplace or p == 1.0 or not x.is_cuda:
        with _plain():
            if p == 1.0:
                noise = x._primal.new_zeros(())
            else:
                noise = torch.empty_like(x._primal, requires_grad=False).bernoulli_(1.0 - p).div_(1.0 - p)
        return x.mul_(noise) if inplace else x * noise
    with _plain():
        out, keep = torch.native_dropout(x._primal, p, True)
        with torch.no_grad():
            small = keep if x._rows is None else x._rows.take(keep)
            t = x._tangent * small / (1.0 - p)
    return DualTensor.make(out, t.to(out.dtype), x._rows, x._batch)


def _rng_states(device: torch.device) -> Any:
    return (torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None)


def _set_rng_states(device: torch.device, states: Any) -> None:
    torch.set_rng_state(states[0])
    if states[1] is not None:
        torch.cuda.set_rng_state(states[1], device)


def _random(call: Call, args: Any, kwargs: Any, batch: Batch) -> Any:
    """A function that draws: its tangent with the primal's draws, of every row so that they fall alike."""
    device = call.slots()[0].primal.device
    before = _rng_states(device)
    out = call.func(*args, **kwargs)
    after = _rng_states(device)
    _set_rng_states(device, before)
    try:
        with torch.no_grad():
            if call.name == "scaled_dot_product_attention":
                outs = _dropped_attention(call, out, device, batch)
            else:
                rows = call.slots()[0].rows
                if len(call.slots()) > 1:
                    raise refused(call.name, "only its input may carry a tangent")
                (t,) = call.dense().jvp()
                outs = [Out(t if rows is None else rows.take(t), rows)]
    finally:
        _set_rng_states(device, after)
    return _wrap(out, outs, [], batch)


def _dropped_attention(call: Call, out: Tensor, device: torch.device, batch: Batch) -> list[Out]:
    if device.type != "cpu":
        raise refused(call.name, "dropout inside fused attention draws where dualize cannot see it; set dropout_p to 0")
    p = call.arg(4, "dropout_p", 0.0)
    q, k = call.args[0], call.args[1]
    shape = (*out.shape[:-1], k.shape[-2])
    call.noise = F.dropout(q.primal.new_ones(shape) if isinstance(q, Slot) else q.new_ones(shape), p)
    return _tangents(call, out, batch)
