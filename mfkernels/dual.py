"""Dual numbers for batches of tensors: `Dual` and the front door `jvp`."""

from __future__ import annotations

import copy
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from numbers import Number
from typing import Any, NamedTuple, TypeVar

import torch
import torch.autograd.forward_ad as fwAD
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ._torch import before_compile, tree_any, tree_flatten, tree_map, tree_map_only, tree_unflatten

T = TypeVar("T")


class Dual(NamedTuple):
    """A primal and the tangent (directional derivative) of its first rows.

    A `Dual` is a tuple, so pytrees, DDP, FSDP2, activation checkpointing and torch.compile see through it. Arithmetic
    (`+ - * /`, unary `-`) works as on tensors; everything else is a function of this package.

    Args:
        primal: (B, …) an ordinary tensor, on the autograd tape as usual.
        tangent: (B_t, …) with B_t <= B: the derivative of the FIRST B_t batch rows; the other rows have tangent zero
            and cost nothing. `None` is a tangent of zero for every row. It has the primal's dtype and device and never
            requires grad: gradients stop at tangents by design.
    """

    primal: Tensor
    tangent: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return self.primal.shape

    @property
    def dtype(self) -> torch.dtype:
        return self.primal.dtype

    @property
    def device(self) -> torch.device:
        return self.primal.device

    @property
    def rows(self) -> int:
        """Number of rows that carry a tangent."""
        return 0 if self.tangent is None else self.tangent.shape[0]

    # A tuple's own `+` and `*` concatenate and repeat; on duals that would be a silent mistake.
    def __add__(self, other: Any) -> Dual:
        return _add(self, other, 1.0)

    def __radd__(self, other: Any) -> Dual:
        return _add(self, other, 1.0)

    def __sub__(self, other: Any) -> Dual:
        return _add(self, other, -1.0)

    def __rsub__(self, other: Any) -> Dual:
        return _add(-self, other, 1.0)

    def __neg__(self) -> Dual:
        return linear_map(torch.neg, self)

    def __mul__(self, other: Any) -> Dual:
        return _mul(self, other)

    def __rmul__(self, other: Any) -> Dual:
        return _mul(self, other)

    def __truediv__(self, other: Any) -> Dual:
        if isinstance(other, Dual):
            raise TypeError("other: a Dual can be divided by a tensor or a number, got a Dual")
        _check_operands(self, other)
        p = _same_batch(self.primal / other, self)
        if self.tangent is None:
            return Dual(p)
        with torch.no_grad():
            t = self.tangent / leading(other, self.rows, p.ndim)
            return Dual(p, t.expand(self.rows, *p.shape[1:]).to(p.dtype))


# NumPy leaves `array * dual` to __rmul__, and does not take a Dual for a sequence.
Dual.__array_ufunc__ = None  # type: ignore[attr-defined]

TensorOrDual = Tensor | Dual


class CarriesTangent(Tensor):
    """A tensor that carries its tangent along through a module that knows nothing of it: see `dualize`."""

    def through(self, run: Callable[..., Any], operands: Sequence[Any]) -> Any:
        """`run(*operands)` with Duals in place of these tensors, and these tensors in place of the Duals it returns."""
        raise NotImplementedError


def primal_of(x: Any) -> Any:
    """The primal of a Dual; anything else unchanged."""
    return x.primal if isinstance(x, Dual) else x


def tangent_of(x: Any) -> Tensor | None:
    """The tangent of a Dual; None (zero) for anything else."""
    return x.tangent if isinstance(x, Dual) else None


def tangent_rows(*xs: Any) -> int | None:
    """Rows of the longest tangent among `xs`; None when none of them has a tangent."""
    rows = [x.tangent.shape[0] for x in xs if isinstance(x, Dual) and x.tangent is not None]
    return max(rows) if rows else None


def padded_tangent(x: Any, rows: int) -> Tensor | None:
    """The tangent of `x` as `rows` rows, the missing ones zero; None when `x` has no tangent."""
    t = tangent_of(x)
    if t is None or t.shape[0] == rows:
        return t
    return torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])


def leading(x: Any, rows: int, ndim: int) -> Any:
    """The first `rows` batch rows of a tensor that broadcasts against an `ndim`-dimensional batch (numbers pass)."""
    return x[:rows] if isinstance(x, Tensor) and x.ndim == ndim and x.shape[0] > 1 else x


def linear_map(fn: Callable[[Tensor], Tensor], x: TensorOrDual) -> Any:
    """Apply a map that is linear in `x` and keeps the batch first (reshape, permute, scaling …) to primal and tangent.

    Args:
        fn: the map, called on the primal and, under no_grad, on the tangent.
        x: (B, …) tensor or Dual.
    """
    if not isinstance(x, Dual):
        return fn(x)
    y = fn(x.primal)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, fn(x.tangent))


def split_map(fn: Callable[[Tensor], Sequence[Tensor]], x: TensorOrDual) -> tuple[Any, ...]:
    """`linear_map` for a map with several outputs (unbind, chunk, split)."""
    if not isinstance(x, Dual):
        return tuple(fn(x))
    ps = fn(x.primal)
    if x.tangent is None:
        return tuple(Dual(p) for p in ps)
    with torch.no_grad():
        return tuple(Dual(p, t) for p, t in zip(ps, fn(x.tangent), strict=True))


def _same_batch(out: Tensor, *operands: Any) -> Tensor:
    """`out`, if its rows are those of every Dual operand: broadcasting over a batch would move the tangents' rows."""
    for x in operands:
        if isinstance(x, Dual) and (x.primal.ndim != out.ndim or x.primal.shape[0] != out.shape[0]):
            raise ValueError(
                f"other: expected an operand that leaves the rows of a Dual of shape {tuple(x.shape)} in place, got a "
                f"result of shape {tuple(out.shape)}; expand the Dual to it first"
            )
    return out


def _check_operands(x: Dual, other: Any) -> None:
    """The operands of arithmetic are Duals whose tangents fit their primals, tensors or numbers."""
    if not isinstance(other, (Dual, Tensor, int, float, Number)):
        raise TypeError(f"other: expected a Dual, a tensor or a number, got {type(other).__name__}")
    for name, a in (("self", x), ("other", other)):
        if isinstance(a, Dual) and not isinstance(a.primal, Tensor):
            raise TypeError(f"{name}.primal: expected a tensor, got {type(a.primal).__name__}")
        if isinstance(a, Dual) and a.tangent is not None:
            check_tangent(f"{name}.tangent", a.primal, a.tangent)


def _add(x: Dual, other: Any, sign: float) -> Dual:
    _check_operands(x, other)
    p = x.primal + primal_of(other) if sign > 0 else x.primal - primal_of(other)
    _same_batch(p, x, other)
    rows = tangent_rows(x, other)
    if rows is None:
        return Dual(p)
    with torch.no_grad():
        a, b = padded_tangent(x, rows), padded_tangent(other, rows)
        if a is None:
            assert b is not None
            t = b if sign > 0 else -b
        elif b is None:
            t = a
        else:
            t = torch.add(a, b, alpha=sign)
        return Dual(p, t.expand(rows, *p.shape[1:]).to(p.dtype))


def _mul(x: Dual, other: Any) -> Dual:
    _check_operands(x, other)
    q = primal_of(other)
    p = _same_batch(x.primal * q, x, other)
    rows = tangent_rows(x, other)
    if rows is None:
        return Dual(p)
    with torch.no_grad():
        a, b = padded_tangent(x, rows), padded_tangent(other, rows)
        t = torch.zeros_like(p[:rows])
        if a is not None:
            t = t + a * leading(q, rows, p.ndim)
        if b is not None:
            t = t + leading(x.primal, rows, p.ndim) * b
        return Dual(p, t.to(p.dtype))


# ------------------------------------------------------------------------------------------------ dual-aware callables


def dual_aware(fn: T) -> T:
    """Mark a module class or function as taking `Dual`s: `jvp` then runs it once, on duals.

    The mark is a promise that every operation inside is one of this package's, or is applied through `linear_map`.
    """
    fn.__dual_aware__ = True  # type: ignore[attr-defined]
    return fn


def _unwrapped(fn: Any) -> Any:
    """The module inside wrappers that only forward their call (DDP, accelerate, torch.compile)."""
    seen = fn
    while isinstance(seen, nn.Module):
        inner = before_compile(seen)
        if inner is None and isinstance(seen, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            inner = seen.module
        if inner is None:
            break
        seen = inner
    return seen


def is_dual_aware(fn: Any) -> bool:
    """Whether `jvp` may call `fn` on Duals (see `dual_aware`); sees through DDP and torch.compile wrappers."""
    return bool(getattr(_unwrapped(fn), "__dual_aware__", False))


# ----------------------------------------------------------------------------------------------------------------- jvp


def jvp(
    fn: Callable[..., Any],
    primals: Sequence[Tensor],
    tangents: Sequence[Tensor | None],
    *,
    rows: int | None = None,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`fn(*primals, **kwargs)` and its directional derivative, with only the primal on the autograd tape.

    A dual-aware `fn` (a model of this project, or anything marked with `mfkernels.dual_aware`) computes both in one
    pass. Any other callable or module is evaluated once for the primal and then, under no_grad and on the first `rows`
    samples only, once more through `torch.func.jvp`: right for every network made of differentiable PyTorch operations
    that treats samples independently, but it repeats the primal's work on those rows and materialises attention. In
    README.md's measured step it costs 2.07x a plain training step with every row and 1.28x with a quarter of them, a
    dual-aware network 1.34x and 1.07x. Dropout draws anew in the second evaluation.

    Args:
        fn: callable of `len(primals)` positional tensors.
        primals: tensors (B, …), all with the same B; floating point where a tangent is given. They and the tangents
            stay as they are: an `fn` that is not this package's may write into its arguments, and gets copies.
        tangents: one per primal, (B, …) or (first rows, …), same trailing shape, dtype and device; `None` is zero.
        rows: number of leading samples R in [0, B] that carry a tangent; default: as many as `tangents` have.
        **kwargs: passed to `fn`. In the fallback, tensors whose first size is B are cut to the first R rows.

    Returns:
        `(out, tangent_out)`: what `fn` returns, and its derivative with R rows. Where `fn` returns several tensors,
        `tangent_out` has the same structure, with `None` for outputs that carry no tangent. In the fallback with fewer
        than all rows an output has its samples in dimension 0, k rows each.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: `fn` is not dual-aware and contains an operation without a forward-mode rule, or
            BatchNorm in training mode, which mixes samples.
    """
    primals, cut, R = _check_jvp(primals, tangents, rows)
    B = primals[0].shape[0]
    if any(isinstance(a, CarriesTangent) for a in (*primals, *cut)):
        raise NotImplementedError(
            "primals: a jvp inside a dualized module is a second derivative, which needs torch.func.jvp of the module"
        )
    bare = _unwrapped(fn)
    if is_dual_aware(fn):
        foreign = getattr(bare, "__dualized__", False)  # may write into any of them
        duals = [p if t is None and not foreign else Dual(p, t) for p, t in zip(primals, cut, strict=True)]
        return _split(fn(*duals, **kwargs), R)
    if any(carries_tangent(a) for a in (*primals, *cut)):
        raise NotImplementedError(
            "primals: a second derivative (jvp inside torch.func.jvp or forward_ad) needs torch.func.jvp itself, or a "
            "dual-aware fn; this would return zero"
        )
    out = fn(*map(unshared, primals), **kwargs)
    if R == 0:
        return out, tree_map(lambda a: _rowless(a, B), out)
    n = min(max(R, 2), B)  # of one sample alone a squeeze() would drop the batch
    with torch.no_grad():
        first = tree_map_only(Tensor, lambda a: a[:n] if a.ndim > 0 and a.shape[0] == B else a, kwargs)
        active = [i for i, t in enumerate(cut) if t is not None]
        leads = [unshared(p.detach()[:n]) for p in primals]
        # PyTorch stores a tangent with its primal's strides, and an expanded one cannot be written
        leads = [p.contiguous() if 0 in p.stride() else p for p in leads]

        structure: list[Any] = []  # of fn's output: its leaves that are not tensors, and how to put them together

        def of_active(*xs: Tensor) -> tuple[Tensor, ...]:
            args = list(leads)
            for i, x in zip(active, xs, strict=True):
                args[i] = x
            leaves, spec = tree_flatten(bare(*args, **first))
            structure[:] = [[isinstance(leaf, Tensor) for leaf in leaves], spec]
            return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

        try:
            with _RefuseSilentZeros(), _RefuseBatchStatistics():
                both = torch.func.jvp(
                    of_active,
                    tuple(leads[i] for i in active),
                    tuple(_extended(t, n) for t in cut if t is not None),
                )
        except (NotImplementedError, RuntimeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            raise explained from error
    are_tensors, spec = structure
    left, outs = zip(both[1], both[0], strict=True), tree_flatten(out)[0]
    if len(outs) != len(are_tensors):
        raise ValueError(f"fn: expected the {len(outs)} outputs of {B} samples for {n}, got {len(are_tensors)}")
    fitting = [
        _of_rows(next(left), o, B, n, R) if is_tensor else None for is_tensor, o in zip(are_tensors, outs, strict=True)
    ]
    return out, tree_unflatten(fitting, spec)


def _rowless(out: Any, batch: int) -> Tensor | None:
    """The tangent of no rows of an output."""
    if not isinstance(out, Tensor):
        return None
    if batch == 0:
        return torch.zeros_like(out)
    none = out[:0] if out.ndim else out
    return torch.zeros_like(_of_rows((none, none), out, batch, 0, 0))


def _extended(t: Tensor, rows: int) -> Tensor:
    """A copy of `t` with `rows` rows, those past its own zero."""
    return torch.cat([t, t.new_zeros(rows - t.shape[0], *t.shape[1:])])


def _of_rows(found: tuple[Tensor, Tensor], out: Tensor, batch: int, evaluated: int, rows: int) -> Tensor:
    """The tangent of the first `rows` samples, from tangent and value of `evaluated` ones and the output of all."""
    t, value = (x.detach() for x in found)
    if t.shape == out.shape and evaluated == rows == batch:
        return t  # of the whole batch, wherever the samples are
    per_sample = out.shape[0] // batch if out.ndim and out.shape[0] % batch == 0 else 0
    fits = per_sample > 0 and t.shape == (per_sample * evaluated, *out.shape[1:])
    # several rows a sample, as repeat_interleave has them; or several batches, of which no first rows are enough
    if fits and per_sample > 1:
        fits = torch.allclose(value, out[: len(value)].detach(), 1e-2, 1e-2, equal_nan=True)
    if not fits:
        raise ValueError(
            f"fn: expected outputs with the {batch} samples of the batch in dimension 0, got shape {tuple(out.shape)} "
            f"(of {evaluated} samples {tuple(t.shape)}); with a tangent for every row (rows={batch}) any shape will do"
        )
    return t[: per_sample * rows]


def unshared(x: Tensor) -> Tensor:
    """A copy for a function that may write into its arguments: the caller's tensors are not its own.

    Its strides stay, on which the last bit of a result may depend: what is expanded takes no more memory than it did.
    With a gradient that stays as it is: PyTorch refuses most writes into it, and `dualize` all that reach the caller's.
    """
    for axis, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True)):
        if step == 0 and n > 1:
            return x if x.requires_grad else unshared(x.narrow(axis, 0, 1)).expand(x.shape)
    y = x.clone()
    if y.stride() != x.stride():
        y = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=x.device).copy_(x)
    return y


def _check_jvp(
    primals: Sequence[Tensor], tangents: Sequence[Tensor | None], rows: int | None
) -> tuple[list[Tensor], list[Tensor | None], int]:
    if isinstance(primals, Tensor) or not isinstance(primals, Sequence) or not primals:
        raise TypeError(f"primals: expected a non-empty tuple of tensors, got {type(primals).__name__}")
    if isinstance(tangents, Tensor) or not isinstance(tangents, Sequence):
        raise TypeError(f"tangents: expected a tuple with one entry per primal, got {type(tangents).__name__}")
    if len(primals) != len(tangents):
        raise ValueError(f"tangents: expected one per primal ({len(primals)}), got {len(tangents)}")
    for i, p in enumerate(primals):
        if not isinstance(p, Tensor):
            raise TypeError(f"primals[{i}]: expected a tensor, got {type(p).__name__}")
        if p.ndim == 0 or p.shape[0] != primals[0].shape[0]:
            raise ValueError(
                f"primals[{i}]: expected a batch of {tuple(primals[0].shape)[:1]} rows, got shape {tuple(p.shape)}"
            )
    B = primals[0].shape[0]
    if rows is not None and (not isinstance(rows, int) or isinstance(rows, bool)):
        raise TypeError(f"rows: expected an integer or None, got {rows!r}")
    if rows is not None and not 0 <= rows <= B:
        raise ValueError(f"rows: expected a number in [0, {B}] (the batch size), got {rows}")
    for i, (p, t) in enumerate(zip(primals, tangents, strict=True)):
        if t is not None:
            check_tangent(f"tangents[{i}]", p, t)
    given = [t.shape[0] for t in tangents if t is not None]
    if not given:
        raise ValueError("tangents: every tangent is None (zero), so there is nothing to differentiate along")
    R = max(given) if rows is None else rows
    cut: list[Tensor | None] = []
    for i, t in enumerate(tangents):
        if t is not None and t.shape[0] < R:
            raise ValueError(f"tangents[{i}]: expected at least {R} rows, got {t.shape[0]}")
        cut.append(None if t is None else t[:R])
    return list(primals), cut, R


def check_tangent(name: str, primal: Tensor, tangent: Tensor) -> None:
    """Raise unless `tangent` can be the tangent of the first rows of `primal`."""
    if not isinstance(tangent, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tangent).__name__}")
    if tangent.layout is not torch.strided:
        raise TypeError(f"{name}: expected a dense (strided) tensor, got layout {tangent.layout}")
    if primal.ndim == 0:
        raise ValueError(f"{name}: expected a primal (B, …) with a batch, got a scalar")
    if not (primal.is_floating_point() or primal.is_complex()):
        raise TypeError(f"{name}: a {primal.dtype} primal has no tangent")
    if tangent.dtype != primal.dtype:
        raise TypeError(f"{name}: expected the primal's dtype {primal.dtype}, got {tangent.dtype}")
    if tangent.device != primal.device:
        raise ValueError(f"{name}: expected the primal's device {primal.device}, got {tangent.device}")
    if tangent.ndim != primal.ndim or tangent.shape[1:] != primal.shape[1:]:
        raise ValueError(
            f"{name}: expected shape (rows, {', '.join(map(str, primal.shape[1:]))}) after a primal of shape "
            f"{tuple(primal.shape)}, got {tuple(tangent.shape)}"
        )
    if tangent.shape[0] > primal.shape[0]:
        raise ValueError(f"{name}: expected at most {primal.shape[0]} rows (the batch), got {tangent.shape[0]}")
    if tangent.requires_grad:
        raise ValueError(f"{name}: a tangent must not require grad (gradients stop at tangents); pass it detached")


def _split(out: Any, rows: int) -> tuple[Any, Any]:
    """Separate a (nested) output of Duals and tensors into primals and tangents."""
    if isinstance(out, Dual):
        if out.tangent is None:
            return out.primal, torch.zeros_like(out.primal[:rows])
        return out.primal, padded_tangent(out, max(rows, out.rows))
    if isinstance(out, Mapping):
        pairs = {k: _split(v, rows) for k, v in out.items()}
        return {k: p for k, (p, _) in pairs.items()}, {k: t for k, (_, t) in pairs.items()}
    if dataclasses.is_dataclass(out) and not isinstance(out, type):
        primal, tangent = copy.copy(out), copy.copy(out)
        for field in dataclasses.fields(out):
            for part, value in zip((primal, tangent), _split(getattr(out, field.name), rows), strict=True):
                object.__setattr__(part, field.name, value)
        return primal, tangent
    if isinstance(out, (tuple, list)):
        parts = [_split(v, rows) for v in out]
        make = out._make if hasattr(out, "_make") else type(out)  # a NamedTuple takes its fields one by one
        return make(p for p, _ in parts), make(t for _, t in parts)
    return out, None


_OPERATORS = (type(torch.ops.aten.neg), type(torch.ops.aten.neg.default))  # with and without a choice of overload


class _RefuseSilentZeros(TorchFunctionMode):
    """Custom operators have no forward-mode rule and return a zero tangent without a word: name them instead."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(func, _OPERATORS):
            name = str(func)
            has_rule = name.startswith(("aten", "prim")) or not tree_any(carries_tangent, (args, kwargs))
            if not has_rule:
                raise NotImplementedError(f"Trying to use forward AD with {name} that does not support it")
        return func(*args, **kwargs)


_MIXES = (
    "mixes batch rows (batch statistics in training mode), so no sample has its own derivative; use eval() or another "
    "norm"
)


class _RefuseBatchStatistics(TorchFunctionMode):
    """Those of the first rows alone are others than the batch's: the tangent would be that of another function."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if getattr(func, "__name__", None) == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training")):
            raise NotImplementedError(f"fn: batch_norm {_MIXES}")
        return func(*args, **kwargs)


def carries_tangent(x: Any) -> bool:
    if isinstance(x, CarriesTangent):
        return True
    return isinstance(x, Tensor) and x.is_floating_point() and fwAD.unpack_dual(x).tangent is not None


def _explained(error: Exception) -> Exception | None:
    """PyTorch's message about what forward mode cannot do as one that says what to do; None for other errors."""
    text = str(error)
    if "mutate a captured Tensor" in text:
        return NotImplementedError(
            f"fn: it writes into a tensor that is none of its arguments. BatchNorm does, and it {_MIXES}. What PyTorch "
            f"says: {text}"
        )
    found = re.search(r"forward AD with (\S+) that does not support", text)
    if found is None and not ("autograd.Function" in text and "jvp" in text):
        return None
    op = found.group(1).rstrip(".") if found else "a custom autograd.Function"
    if "scaled_dot_product" in op:
        cure = (
            "mfkernels.scaled_dot_product_attention takes its place, with the same arguments; where the module cannot "
            "be edited, run it within `with mfkernels.patch_sdpa():`, or give mfkernels.dualize(module) instead"
        )
    elif "attention" in op or "flash" in op or "attn" in op:
        cure = "take mfkernels.scaled_dot_product_attention, of (B, H, N, d), or mfkernels.attention, of (B, N, H, d)"
    else:
        cure = "give it a jvp rule, or write it with operations of mfkernels and mark the module mfkernels.dual_aware"
    return NotImplementedError(f"fn: {op} has no forward-mode (JVP) rule, so its tangent cannot be computed; {cure}")


__all__ = ["Dual", "TensorOrDual", "dual_aware", "is_dual_aware", "jvp", "linear_map", "split_map"]
