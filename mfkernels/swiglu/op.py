from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose, rows_unsupported
from ..checks import check_operand, check_rows, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("swiglu_forward")
def _forward(a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, …, D) and its tangent (B_t, …, D), B_t = 0 where there is none."""
    from .kernels import swiglu_forward

    y, y_dot = swiglu_forward(a, b, a_dot, b_dot)
    return y, y.new_empty((0, *y.shape[1:])) if y_dot is None else y_dot


@_forward.register_fake
def _(a, b, a_dot, b_dot):  # type: ignore[no-untyped-def]
    rows = next((x.shape[0] for x in (a_dot, b_dot) if x is not None), 0)
    y = a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype))
    return y, y.new_empty((rows, *a.shape[1:]))


@operator("swiglu_backward")
def _backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import swiglu_backward

    return swiglu_backward(dy, a, b)


@_backward.register_fake
def _(dy, a, b):  # type: ignore[no-untyped-def]
    return a.new_empty(a.shape), b.new_empty(b.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs[:2])  # nothing of the tangent


def _backward_rule(ctx, dy, _dy_dot):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 4
    return *_backward(dy, *ctx.saved_tensors), None, None


_forward.register_autograd(_backward_rule, setup_context=_setup_context)

# ------------------------------------------------------------------------------------------------- the public function


def swiglu(a: TensorOrDual, b: TensorOrDual) -> TensorOrDual:
    """The gate of a SwiGLU feed-forward network (arXiv 2002.05202), silu(a) ∘ b.

    Tangent: silu'(a)∘ȧ∘b + silu(a)∘ḃ with silu'(a) = σ(a) (1 + a (1 − σ(a))); under `torch.func.jvp` or `forward_ad`
    the same rule serves plain tensors.

    Args:
        a, b: (B, …, D) tensors or Duals, for instance the two halves (views) of one projection; any strides.

    Returns:
        (B, …, D); a Dual if any argument is one.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    check_rows("a", a)
    check_operand("b", b)
    check_shape("b", b, tuple(a.shape), "(B, …, D) of a")
    check_same("b", b, "a", a)
    return bridge_forward_mode("swiglu", _run, a, b)


def _run(a: TensorOrDual, b: TensorOrDual) -> TensorOrDual:
    ap, bp = primal_of(a), primal_of(b)
    rows = tangent_rows(a, b)
    dual = isinstance(a, Dual) or isinstance(b, Dual)
    if choose("swiglu", ap.device, {"triton": lambda: rows_unsupported(a=ap, b=bp)}) == "triton":
        dots = (None, None) if rows is None else (padded_tangent(a, rows), padded_tangent(b, rows))
        y, y_dot = _forward(ap, bp, *dots)
        return Dual(y, None if rows is None else y_dot) if dual else y
    y = reference.swiglu(ap, bp)
    if not dual:
        return y
    if rows is None:
        return Dual(y)
    with torch.no_grad():
        y_dot = reference.swiglu_tangent(
            a=ap[:rows],
            b=bp[:rows],
            a_dot=padded_tangent(a, rows),
            b_dot=padded_tangent(b, rows),
        )
        return Dual(y, y_dot.to(y.dtype))
