from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from ..backend import choose, rows_unsupported
from ..checks import autocast_enabled, check_number, check_operand, check_same, check_shape
from ..dual import Dual, TensorOrDual, padded_tangent, primal_of, tangent_rows
from ..forward_mode import bridge_forward_mode
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


def promoted(*tensors: Tensor) -> torch.dtype:
    """The dtype of an expression of all of them (they differ under autocast alone)."""
    dtype = tensors[0].dtype
    for x in tensors[1:]:
        dtype = torch.promote_types(dtype, x.dtype)
    return dtype


def normed_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype of a norm's output. Under autocast it is autocast's: a product reads it, and would cast it first."""
    dtype, device = promoted(*tensors), tensors[0].device
    if dtype != torch.float64 and autocast_enabled(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


@operator("ada_layer_norm_forward")
def _forward(
    x: Tensor,
    shift: Tensor,
    scale: Tensor,
    x_dot: Tensor | None,
    shift_dot: Tensor | None,
    scale_dot: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    """h (B, N, D), its tangent (B_t, N, D) with B_t = 0 where there is none, mean and rstd (B, N, 2) float32."""
    from .kernels import Tangents, norm_forward

    _, h, _, h_dot, stats = norm_forward(
        x,
        None,
        None,
        shift,
        scale,
        Tangents(x=x_dot, shift=shift_dot, scale=scale_dot),
        eps=eps,
        x_dtype=x.dtype,
        h_dtype=dtype,
    )
    return h, h.new_empty((0, *h.shape[1:])) if h_dot is None else h_dot, stats


@_forward.register_fake
def _(x, shift, scale, x_dot, shift_dot, scale_dot, eps, dtype):  # type: ignore[no-untyped-def]
    rows = next((a.shape[0] for a in (x_dot, shift_dot, scale_dot) if a is not None), 0)
    B, N, D = x.shape
    h = x.new_empty((B, N, D), dtype=dtype)
    return h, h.new_empty((rows, N, D)), x.new_empty((B, N, 2), dtype=torch.float32)


@operator("ada_layer_norm_backward")
def _backward(dh: Tensor, x: Tensor, scale: Tensor, stats: Tensor) -> tuple[Tensor, Tensor]:
    """dx (B, N, D) and [dshift, dscale] (2, B, D)."""
    from .kernels import norm_backward

    dx, _, dmodulation, _ = norm_backward(dh, None, x, None, scale, stats)
    return dx, dmodulation


@_backward.register_fake
def _(dh, x, scale, stats):  # type: ignore[no-untyped-def]
    return x.new_empty(x.shape), scale.new_empty((2, *scale.shape))


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, scale, *_ = inputs
    _, h_dot, stats = output
    ctx.mark_non_differentiable(h_dot, stats)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, scale, stats)  # nothing of the tangent


def _backward_rule(ctx, dh, _dh_dot, _dstats):  # type: ignore[no-untyped-def]
    if dh is None:
        return (None,) * 8
    dx, (dshift, dscale) = _backward(dh, *ctx.saved_tensors)
    return dx, dshift, dscale, *(None,) * 5


_forward.register_autograd(_backward_rule, setup_context=_setup_context)


# ------------------------------------------------------------------------------------------------- the public function


def ada_layer_norm(
    x: TensorOrDual,
    shift: TensorOrDual,
    scale: TensorOrDual,
    *,
    eps: float = 1e-6,
) -> TensorOrDual:
    """LayerNorm without weights, then the sample's own scale and shift: y = x̂ (1 + scale) + shift.

    DiT's "modulate(norm(x), shift, scale)" (arXiv 2212.09748, §3.2, adaLN). Statistics are computed in float32 or
    better. Tangent: ẏ = x̂_dot (1 + scale) + x̂∘scale_dot + shift_dot, x̂_dot = rstd·(ẋ − mean(ẋ) − x̂·mean(x̂∘ẋ));
    under `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x: (B, N, D) tensor or Dual.
        shift, scale: (B, D) tensors or Duals; views with any strides.
        eps: added to the variance, >= 0.

    Returns:
        (B, N, D); a Dual if any argument is one. In the arguments' dtype; under autocast in autocast's, unless they are
        float64.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call.
    """
    eps = check_ada_layer_norm(x, shift, scale, eps)
    return bridge_forward_mode("ada_layer_norm", partial(_run, eps=eps), x, shift, scale)


def check_ada_layer_norm(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, eps: float) -> float:
    check_operand("x", x, 3)
    for name, m in (("shift", shift), ("scale", scale)):
        check_operand(name, m, 2)
        check_shape(name, m, (x.shape[0], x.shape[2]), "(B, D) of x")
        check_same(name, m, "x", x)
    return check_number("eps", eps, 0)


def _run(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, eps: float) -> TensorOrDual:
    operands = (x, shift, scale)
    primals = {"x": primal_of(x), "shift": primal_of(shift), "scale": primal_of(scale)}
    if choose("ada_layer_norm", x.device, {"triton": lambda: rows_unsupported(**primals)}) == "reference":
        return run_reference(x, shift, scale, eps)
    rows = tangent_rows(*operands)
    dots = (None, None, None) if rows is None else tuple(padded_tangent(a, rows) for a in operands)
    h, h_dot, _ = _forward(*map(primal_of, operands), *dots, eps, normed_dtype(*primals.values()))
    if not any(isinstance(a, Dual) for a in operands):
        return h
    return Dual(h, None if rows is None else h_dot)


def run_reference(x: TensorOrDual, shift: TensorOrDual, scale: TensorOrDual, eps: float) -> TensorOrDual:
    xp, sp, cp = primal_of(x), primal_of(shift), primal_of(scale)
    y, (x_hat, mean, rstd) = reference.ada_layer_norm(xp, sp, cp, eps)
    y = y.to(normed_dtype(xp, sp, cp))
    if not any(isinstance(a, Dual) for a in (x, shift, scale)):
        return y
    rows = tangent_rows(x, shift, scale)
    if rows is None:
        return Dual(y)

    def first(a: Tensor) -> Tensor:
        return a[:rows]

    with torch.no_grad():
        y_dot = reference.ada_layer_norm_tangent(
            x=first(xp),
            scale=first(cp),
            x_dot=padded_tangent(x, rows),
            shift_dot=padded_tangent(shift, rows),
            scale_dot=padded_tangent(scale, rows),
            x_hat=first(x_hat),
            mean=first(mean),
            rstd=first(rstd),
        )
        return Dual(y, y_dot.to(y.dtype))
