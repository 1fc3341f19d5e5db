from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backend import choose, triton_unavailable, unsupported_dtype
from ..checks import check_parameter, check_rows, check_shape
from ..dual import Dual, TensorOrDual, primal_of
from ..forward_mode import bridge_forward_mode, refuse_tangent
from ..operator import operator
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules
# The first product is PyTorch's own. Bias, GELU and the second product are one op, so that the backward may keep the
# pre-activation alone: a plain MLP keeps the activation as well, D_hidden numbers a token.


@operator("gelu_linear_forward")
def _forward(
    h: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    h_dot: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """gelu(h + b1) W₂ᵀ + b2 (M, D_out) of h (M, D_hidden), and its tangent (M_t, D_out), M_t = 0 without one."""
    from .kernels import gelu_forward

    with torch.autocast(h.device.type, enabled=False):
        a, a_dot = gelu_forward(h, b1, h_dot)  # [M, D_hidden], [M_t, D_hidden]
        y = F.linear(a, w2, b2)  # [M, D_out]
        return y, y.new_empty((0, y.shape[1])) if a_dot is None else F.linear(a_dot, w2)


@_forward.register_fake
def _(h, b1, w2, b2, h_dot):  # type: ignore[no-untyped-def]
    rows = 0 if h_dot is None else h_dot.shape[0]
    return h.new_empty((h.shape[0], w2.shape[0])), h.new_empty((rows, w2.shape[0]))


@operator("gelu_linear_backward")
def _backward(
    dy: Tensor,
    h: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    has_b2: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dh (M, D_hidden), db1, dw2 and db2; the gradient of a bias that is not there has no elements."""
    from .kernels import gelu_backward

    with torch.autocast(h.device.type, enabled=False):
        a, dh, db1 = gelu_backward(h, b1, dy @ w2)
        db2 = dy.sum(0) if has_b2 else dy.new_empty(0)  # [D_out]
        return dh, dy.new_empty(0) if db1 is None else db1, dy.mT @ a, db2


@_backward.register_fake
def _(dy, h, b1, w2, has_b2):  # type: ignore[no-untyped-def]
    db1 = dy.new_empty(0) if b1 is None else b1.new_empty(b1.shape)
    return h.new_empty(h.shape), db1, w2.new_empty(w2.shape), dy.new_empty(dy.shape[1] if has_b2 else 0)


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    h, b1, w2, b2, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)
    ctx.has_b2 = b2 is not None
    ctx.save_for_backward(h, b1, w2)  # nothing of the tangent


def _backward_rule(ctx, dy, _dy_dot):  # type: ignore[no-untyped-def]
    if dy is None:
        return (None,) * 5
    h, b1, w2 = ctx.saved_tensors
    dh, db1, dw2, db2 = _backward(dy, h, b1, w2, ctx.has_b2)
    return dh, None if b1 is None else db1, dw2, db2 if ctx.has_b2 else None, None


_forward.register_autograd(_backward_rule, setup_context=_setup_context)


def _triton_unsupported(x: Tensor) -> str | None:
    return triton_unavailable(x.device) or unsupported_dtype("x", x)


# ------------------------------------------------------------------------------------------------- the public function


def mlp(
    x: TensorOrDual,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
) -> TensorOrDual:
    """Two-layer perceptron with the tanh form of GELU: y = gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂.

    The tangent is ẏ = (gelu'(h) ∘ ẋ W₁ᵀ) W₂ᵀ at the pre-activation h (arXiv 1606.08415 for GELU); under
    `torch.func.jvp` or `forward_ad` the same rule serves plain tensors.

    Args:
        x: (B, …, D_in) tensor or Dual.
        w1: (D_hidden, D_in); b1: (D_hidden,) or None.
        w2: (D_out, D_hidden); b2: (D_out,) or None.

    Returns:
        (B, …, D_out), of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        NotImplementedError: the backend that was asked for cannot serve the call; a parameter has a tangent.
    """
    check_rows("x", x)
    for name, p, ndim in (("w1", w1, 2), ("b1", b1, 1), ("w2", w2, 2), ("b2", b2, 1)):
        if p is not None or ndim == 2:
            check_parameter(name, p, ndim, x)
            refuse_tangent(name, p, "parameter")
    if x.shape[-1] != w1.shape[1]:
        raise ValueError(f"x: expected last size {w1.shape[1]} (D_in of w1), got shape {tuple(x.shape)}")
    if w2.shape[1] != w1.shape[0]:
        raise ValueError(f"w2: expected (D_out, {w1.shape[0]}) after w1 {tuple(w1.shape)}, got {tuple(w2.shape)}")
    for name, b, w in (("b1", b1, w1), ("b2", b2, w2)):
        if b is not None:
            check_shape(name, b, (w.shape[0],), f"({w.shape[0]},)")
    return bridge_forward_mode("mlp", lambda x: _run(x, w1, b1, w2, b2), x)


def _run(x: TensorOrDual, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> TensorOrDual:
    xp = primal_of(x)
    if choose("mlp", xp.device, {"triton": lambda: _triton_unsupported(xp)}) == "reference":
        return _run_reference(x, w1, b1, w2, b2)
    h = F.linear(xp, w1).flatten(0, -2)  # [M, D_hidden], M = B·…
    h_dot = None
    if isinstance(x, Dual) and x.tangent is not None:
        with torch.no_grad():
            h_dot = F.linear(x.tangent, w1).flatten(0, -2)  # [M_t, D_hidden]
    # under autocast h is in its dtype and the parameters are not; b1 is added in float32 as it is
    y, y_dot = _forward(h, b1, w2.to(h.dtype), None if b2 is None else b2.to(h.dtype), h_dot)
    y = y.unflatten(0, xp.shape[:-1])  # [B, …, D_out]
    if not isinstance(x, Dual):
        return y
    return Dual(y, None if x.tangent is None else y_dot.unflatten(0, x.tangent.shape[:-1]))


def _run_reference(x: TensorOrDual, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> TensorOrDual:
    if not isinstance(x, Dual):
        return reference.mlp(x, w1, b1, w2, b2)[0]
    y, h = reference.mlp(x.primal, w1, b1, w2, b2)
    if x.tangent is None:
        return Dual(y)
    with torch.no_grad():
        return Dual(y, reference.mlp_tangent(h[: x.rows], x.tangent, w1, w2))
