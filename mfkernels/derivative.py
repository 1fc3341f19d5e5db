"""`jvp`: a function's value and directional derivative, and explanations of the errors where there is none."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ._torch import tree_any, tree_flatten, tree_map, tree_map_only, tree_unflatten
from .dual import Dual, check_tangent, is_dual_aware, map_output, padded_tangent, primal_of, unshared, unwrapped
from .forward_mode import CarriesTangent, carries_tangent


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
    if any(isinstance(a, CarriesTangent) for a in (*primals, *cut)):
        raise NotImplementedError(
            "primals: a jvp inside a dualized module is a second derivative, which needs torch.func.jvp of the module"
        )
    if is_dual_aware(fn):
        dualized = getattr(unwrapped(fn), "__dualized__", False)  # may write into any argument
        duals = [p if t is None and not dualized else Dual(p, t) for p, t in zip(primals, cut, strict=True)]
        return split_output(fn(*duals, **kwargs), R)
    if any(carries_tangent(a) for a in (*primals, *cut)):
        raise NotImplementedError(
            "primals: a second derivative (jvp inside torch.func.jvp or forward_ad) needs torch.func.jvp itself, or a "
            "dual-aware fn; this would return zero"
        )
    out = fn(*map(unshared, primals), **kwargs)
    return out, _forward_mode(unwrapped(fn), primals, cut, R, kwargs, out)


def split_output(out: Any, rows: int) -> tuple[Any, Any]:
    """A dual-aware function's output as its primals and its tangents, of `rows` rows at least."""

    def tangent(x: Any) -> Tensor | None:
        if not isinstance(x, Dual):
            return None
        return torch.zeros_like(x.primal[:rows]) if x.tangent is None else padded_tangent(x, max(rows, x.rows))

    return map_output(primal_of, out), map_output(tangent, out)


def _forward_mode(
    fn: Callable[..., Any],
    primals: list[Tensor],
    tangents: list[Tensor | None],
    rows: int,
    kwargs: dict[str, Any],
    out: Any,
) -> Any:
    """The tangent of `out`, what `fn` returned for all samples, by `torch.func.jvp` on the first `rows` of them."""
    B = primals[0].shape[0]
    if rows == 0:
        return tree_map(lambda a: _rowless(a, B), out)
    n = min(max(rows, 2), B)  # of one sample alone a squeeze() would drop the batch
    is_tensor: list[bool] = []  # of the leaves of fn's output
    spec: Any = None

    def of_active(*xs: Tensor) -> tuple[Tensor, ...]:
        nonlocal is_tensor, spec
        given = iter(xs)
        args = [p if t is None else next(given) for p, t in zip(first, tangents, strict=True)]
        leaves, spec = tree_flatten(fn(*args, **first_kwargs))
        is_tensor = [isinstance(leaf, Tensor) for leaf in leaves]
        return tuple(leaf for leaf in leaves if isinstance(leaf, Tensor))

    with torch.no_grad():
        first_kwargs = tree_map_only(Tensor, lambda a: a[:n] if a.ndim > 0 and a.shape[0] == B else a, kwargs)
        first = [unshared(p.detach()[:n]) for p in primals]
        # PyTorch stores a tangent with its primal's strides, and an expanded one cannot be written
        first = [p.contiguous() if 0 in p.stride() else p for p in first]
        active = tuple(p for p, t in zip(first, tangents, strict=True) if t is not None)
        dots = tuple(_extended(t, n) for t in tangents if t is not None)
        try:
            with _RefuseWrongTangents():
                both = torch.func.jvp(of_active, active, dots)
        except (NotImplementedError, RuntimeError) as error:
            explained = _explained(error)
            if explained is None:
                raise
            raise explained from error
    found, outs = zip(both[1], both[0], strict=True), tree_flatten(out)[0]
    if len(outs) != len(is_tensor):
        raise ValueError(f"fn: expected the {len(outs)} outputs of {B} samples for {n}, got {len(is_tensor)}")
    fitting = [
        _of_rows(next(found), o, B, n, rows) if tensor else None for tensor, o in zip(is_tensor, outs, strict=True)
    ]
    return tree_unflatten(fitting, spec)


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


_OPERATORS = (type(torch.ops.aten.neg), type(torch.ops.aten.neg.default))  # with and without a choice of overload
_MIXES = (
    "mixes batch rows (batch statistics in training mode), so no sample has its own derivative; use eval() or another "
    "norm"
)


class _RefuseWrongTangents(TorchFunctionMode):
    """Raise where `torch.func.jvp` would return a wrong tangent silently."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # batch statistics of the first rows alone differ from the batch's: the tangent would be of another function
        if getattr(func, "__name__", None) == "batch_norm" and (args[5] if len(args) > 5 else kwargs.get("training")):
            raise NotImplementedError(f"fn: batch_norm {_MIXES}")
        # custom operators have no forward-mode rule: their tangent would be zero
        custom = isinstance(func, _OPERATORS) and not str(func).startswith(("aten", "prim"))
        if custom and tree_any(carries_tangent, (args, kwargs)):
            raise NotImplementedError(f"Trying to use forward AD with {func} that does not support it")
        return func(*args, **kwargs)


def _explained(error: Exception) -> Exception | None:
    """An error of PyTorch's forward mode as one that names the remedy; None for other errors."""
    text = str(error)
    if "mutate a captured Tensor" in text:
        return NotImplementedError(
            f"fn: it writes into a tensor that is none of its arguments. BatchNorm does, and it {_MIXES}. PyTorch's "
            f"message: {text}"
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
