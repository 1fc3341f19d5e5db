from __future__ import annotations

from functools import partial
from numbers import Integral

import torch
from torch import Tensor

from ..backend import MAX_WIDTH, choose, triton_unavailable, unsupported_dtype
from ..checks import check_number, check_operand
from ..dual import Dual, TensorOrDual, primal_of, tangent_of
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules


@operator("timestep_embedding_forward")
def _forward(t: Tensor, t_dot: Tensor | None, dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    """(B, dim) and its tangent (B_t, dim), B_t = 0 where there is none."""
    from .kernels import embedding_forward

    out, out_dot = embedding_forward(t, t_dot, dim, max_period)
    return out, out.new_empty((0, dim)) if out_dot is None else out_dot


@_forward.register_fake
def _(t, t_dot, dim, max_period):  # type: ignore[no-untyped-def]
    return t.new_empty((t.shape[0], dim)), t.new_empty((0 if t_dot is None else t_dot.shape[0], dim))


@operator("timestep_embedding_backward")
def _backward(dout: Tensor, t: Tensor, max_period: float) -> Tensor:
    from .kernels import embedding_backward

    return embedding_backward(dout, t, max_period)


@_backward.register_fake
def _(dout, t, max_period):  # type: ignore[no-untyped-def]
    return t.new_empty(t.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    t, _, _, ctx.max_period = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(t)  # nothing of the tangent


def _backward_rule(ctx, dout, _dout_dot):  # type: ignore[no-untyped-def]
    if dout is None:
        return (None,) * 4
    return _backward(dout, *ctx.saved_tensors, ctx.max_period), None, None, None


_forward.register_autograd(_backward_rule, setup_context=_setup_context)


def _triton_unsupported(t: Tensor, dim: int) -> str | None:
    reason = triton_unavailable(t.device) or unsupported_dtype("t", t.dtype)
    if reason is not None:
        return reason
    return f"dim: expected at most {MAX_WIDTH}, got {dim}" if dim > MAX_WIDTH else None


# ------------------------------------------------------------------------------------------------- the public function


def timestep_embedding(t: TensorOrDual, dim: int, *, max_period: float = 10000.0) -> TensorOrDual:
    """Sinusoidal features of a scalar, [cos(tω), sin(tω)] (arXiv 1706.03762, §3.5, in DiT's order: cosines first).

    Tangent: ṫ·ω·[−sin(tω), cos(tω)]; under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        t: (B,) times in any unit; MeanFlow uses [0, 1].
        dim: number of features, even.
        max_period: period of the slowest feature, > 1.

    Returns:
        (B, dim), of the kind and dtype of `t`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    check_operand("t", t, 1)
    if not isinstance(dim, Integral) or dim < 2 or dim % 2 != 0:
        raise ValueError(f"dim: expected an even integer >= 2, got {dim}")
    max_period = check_number("max_period", max_period, 1, above=True)
    return bridge_forward_mode("timestep_embedding", partial(_run, dim=int(dim), max_period=max_period), t)


def _run(t: TensorOrDual, dim: int, max_period: float) -> TensorOrDual:
    tp, t_dot = primal_of(t), tangent_of(t)
    if choose("timestep_embedding", tp.device, {"triton": lambda: _triton_unsupported(tp, dim)}) == "reference":
        return _run_reference(t, dim, max_period)
    out, out_dot = _forward(tp, t_dot, dim, max_period)
    return Dual(out, None if t_dot is None else out_dot) if isinstance(t, Dual) else out


def _run_reference(t: TensorOrDual, dim: int, max_period: float) -> TensorOrDual:
    if not isinstance(t, Dual):
        return reference.timestep_embedding(t, dim, max_period)
    y = reference.timestep_embedding(t.primal, dim, max_period)
    if t.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.timestep_embedding_tangent(t.primal[: t.rows], t.tangent, dim, max_period))
