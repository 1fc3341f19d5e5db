from __future__ import annotations

import torch
from torch import Tensor

from ..backend import choose, rows_unsupported
from ..checks import check_constant, check_number, check_rows
from ..dual import Dual, TensorOrDual, primal_of, tangent_of
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("rms_norm_forward")
def _forward(x: Tensor, x_dot: Tensor | None, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y (B, …, D) and its tangent (B_t, …, D), B_t = 0 where there is none."""
    from .kernels import rms_norm_forward

    y, y_dot = rms_norm_forward(x, x_dot, weight, eps=eps)
    return y, y.new_empty((0, *y.shape[1:])) if y_dot is None else y_dot


@_forward.register_fake
def _(x, x_dot, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), x.new_empty((0 if x_dot is None else x_dot.shape[0], *x.shape[1:]))


@operator("rms_norm_backward")
def _backward(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    from .kernels import rms_norm_backward

    return rms_norm_backward(dy, x, weight, eps=eps)


@_backward.register_fake
def _(dy, x, weight, eps):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, weight, ctx.eps = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight)  # nothing of the tangent


def _backward_rule(ctx, dy, _dy_dot):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 4
    dx, dweight = _backward(dy, *ctx.saved_tensors, ctx.eps)
    return dx, None, dweight, None


_forward.register_autograd(_backward_rule, setup_context=_setup_context)

# ------------------------------------------------------------------------------------------------- the public function


def rms_norm(x: TensorOrDual, weight: Tensor, *, eps: float = 1e-6) -> TensorOrDual:
    """Root-mean-square norm of the last dimension with a weight per channel, y = x (mean(x²) + eps)^(-1/2) ∘ weight.

    arXiv 1910.07467. Statistics are computed in float32 or better. Tangent: ẏ = rstd·(ẋ − x̂·mean(x̂∘ẋ)) ∘ weight;
    under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x: (B, …, D) tensor or Dual; any strides.
        weight: (D,), a plain multiplier (a norm that stores weight − 1 adds the one before the call); any float dtype.
        eps: added to the mean square, >= 0.

    Returns:
        (B, …, D) in the dtype of `x`, of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call; `weight` has a tangent.
    """
    check_rows("x", x)
    check_constant("weight", weight, x.shape[-1:], "(D,) of x", x)
    eps = check_number("eps", eps, 0)
    return bridge_forward_mode("rms_norm", lambda x: _run(x, weight, eps), x)


def _run(x: TensorOrDual, weight: Tensor, eps: float) -> TensorOrDual:
    xp = primal_of(x)
    if choose("rms_norm", xp.device, {"triton": lambda: rows_unsupported(x=xp, weight=weight)}) == "triton":
        y, y_dot = _forward(xp, tangent_of(x), weight, eps)
        return Dual(y, None if tangent_of(x) is None else y_dot) if isinstance(x, Dual) else y
    if not isinstance(x, Dual):
        return reference.rms_norm(x, weight, eps)
    y = reference.rms_norm(x.primal, weight, eps)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.rms_norm_tangent(x.primal[: x.rows], weight, x.tangent, eps).to(y.dtype))
