from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from .._torch import addmm_activation
from ..backend import capability, triton_unsupported
from ..calls import is_untransformed
from ..checks import check_parameter, check_rows, check_shape
from ..dual import TensorOrDual
from ..forward_mode import refuse_tangent
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..products import in_dtype, product_dtype, weight_gradient, without_autocast
from ..router import Backend, DualOp
from . import cublaslt, reference

# ------------------------------------------------------------------------------------------- operator and its rules
# One op from end to end, so that the backward may keep the pre-activation alone: a plain MLP keeps the activation as
# well, D_hidden numbers a token. Under autocast the weights are cast here, and their gradients are not.


@operator("mlp_forward")
def _forward(
    x: Tensor,
    x_dot: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dtype: torch.dtype,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """gelu(x W₁ᵀ + b₁) W₂ᵀ + b₂ (M, D_out) of x (M, D_in), its tangent (M_t, D_out), M_t = 0 without one.

    Then what the backward reads: x and W₁, W₂ in `dtype`, each (0,) where it is given in that, and h (M, D_hidden):
    x W₁ᵀ, or x W₁ᵀ + b₁ by cuBLASLt.
    """
    from .kernels import gelu_forward, gelu_tangent

    x_low, w1_low, w2_low = (in_dtype(a, dtype) for a in (x, w1, w2))
    h_dot = None if x_dot is None else F.linear(in_dtype(x_dot, dtype), w1_low)  # [M_t, D_hidden]
    if backend == "cublaslt" and b1 is not None:
        a, h = cublaslt.gelu_product(x_low, w1_low, in_dtype(b1, dtype))  # [M, D_hidden] both
        a_dot = None if h_dot is None else gelu_tangent(h, h_dot)  # [M_t, D_hidden]
    else:
        h = F.linear(x_low, w1_low)  # [M, D_hidden]
        a, a_dot = gelu_forward(h, b1, h_dot)  # [M, D_hidden], [M_t, D_hidden]
    y = F.linear(a, w2_low, None if b2 is None else in_dtype(b2, dtype))  # [M, D_out]
    y_dot = None if a_dot is None else F.linear(a_dot, w2_low)  # [M_t, D_out]
    lows = [y.new_empty(0) if low is a else low for low, a in ((x_low, x), (w1_low, w1), (w2_low, w2))]
    return y, tangent_or_empty(y_dot, y), h, lows[0], lows[1], lows[2]


@_forward.register_fake
def _(x, x_dot, w1, b1, w2, b2, dtype, backend="triton"):  # type: ignore[no-untyped-def]
    y, h = (x.new_empty((x.shape[0], w.shape[0]), dtype=dtype) for w in (w2, w1))
    return (
        y,
        y.new_empty((num_tangent_rows(x_dot), w2.shape[0])),
        h,
        *(y.new_empty(0) if a.dtype == dtype else torch.empty_like(a, dtype=dtype) for a in (x, w1, w2)),
    )


@operator("mlp_backward")
def _backward(
    dy: Tensor,
    x: Tensor,
    h: Tensor,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    has_b2: bool,
    dtype: torch.dtype,
    backend: str = "triton",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dx (M, D_in), dw1, db1, dw2 and db2, the weights' in `dtype`; of a bias that is not there (0,)."""
    from .kernels import gelu_backward, gelu_forward

    with without_autocast(x.device):
        if backend == "cublaslt" and b1 is not None:
            dh, sums = cublaslt.gelu_product_backward(dy, w2, h)  # [M, D_hidden], [D_hidden]
            db1: Tensor | None = in_dtype(sums, b1.dtype)
            a, _ = gelu_forward(h, None, None)  # [M, D_hidden]
        else:
            a, dh, db1 = gelu_backward(h, b1, torch.mm(dy, w2))  # [M, D_hidden] both
        dw2 = weight_gradient(dy, a, dtype)  # [D_out, D_hidden]
        db2 = dy.sum(0, dtype=dtype) if has_b2 else dy.new_empty(0)  # [D_out]
        dx, dw1 = torch.mm(dh, w1), weight_gradient(dh, x, dtype)  # [M, D_in], [D_hidden, D_in]
        return dx, dw1, dy.new_empty(0) if db1 is None else db1, dw2, db2


@_backward.register_fake
def _(dy, x, h, w1, b1, w2, has_b2, dtype, backend="triton"):  # type: ignore[no-untyped-def]
    db1 = dy.new_empty(0) if b1 is None else b1.new_empty(b1.shape)
    dw1, dw2 = (w.new_empty(w.shape, dtype=dtype) for w in (w1, w2))
    return dy.new_empty(x.shape), dw1, db1, dw2, dy.new_empty(dy.shape[1] if has_b2 else 0, dtype=dtype)


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    x, _, w1, b1, w2, b2, dtype, ctx.backend = inputs
    _, _, h, *low = output
    ctx.has_b2, ctx.dtype = b2 is not None, w1.dtype
    x, w1, w2 = (a if a.dtype == dtype else b for a, b in zip((x, w1, w2), low, strict=True))
    return x, h, w1, b1, w2


def _gradients(ctx, dy):  # type: ignore[no-untyped-def]
    x, h, w1, b1, w2 = ctx.saved_tensors
    dx, dw1, db1, dw2, db2 = _backward(dy, x, h, w1, b1, w2, ctx.has_b2, ctx.dtype, ctx.backend)
    return dx, None, dw1, None if b1 is None else db1, dw2, db2 if ctx.has_b2 else None


_forward.register_gradients(_gradients, save=_saved)


def _wrapper(
    forward: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    x_dot: Tensor | None,
    w1: Tensor,
    b1: Tensor | None,
    w2: Tensor,
    b2: Tensor | None,
    dtype: torch.dtype,
    backend: str = "triton",
) -> tuple[Tensor, Tensor | None]:
    """y (B, …, D_out) of x (B, …, D_in), and its tangent."""
    value_alone = x_dot is None and x.shape[-1] > 0 and not torch.is_grad_enabled()
    if value_alone and b1 is not None and _fuses_gelu(x.device) and is_untransformed(x, w1, b1, w2, b2):
        return _run_without_gradients(x, w1, b1, w2, b2, dtype), None
    rows_dot = None if x_dot is None else x_dot.flatten(0, -2)  # [M_t, D_in]
    y, y_dot, *_ = forward(x.flatten(0, -2), rows_dot, w1, b1, w2, b2, dtype, backend)  # M = B·…
    y = y.view(*x.shape[:-1], w2.shape[0])  # [B, …, D_out]
    return y, None if x_dot is None else y_dot.view(*x_dot.shape[:-1], w2.shape[0])  # [B_t, …, D_out]


def _run_without_gradients(
    x: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """The value alone: cuBLASLt's product ends in bias and GELU, so that h is neither written nor read."""
    rows, w1, b1, w2 = (in_dtype(a, dtype) for a in (x.flatten(0, -2), w1, b1, w2))
    a = addmm_activation(b1, rows, w1.t(), use_gelu=True)  # [M, D_hidden]
    y = F.linear(a, w2, None if b2 is None else in_dtype(b2, dtype))  # [M, D_out]
    return y.view(*x.shape[:-1], w2.shape[0])


def _fuses_gelu(device: torch.device) -> bool:
    """Whether PyTorch has such a product, with our form of GELU, where others measured it to be faster than two passes.

    It is on H100, H200 and B200; on RTX 4090 and 5090 it is slower (karpathy/llm.c#591, sgl-project/sglang#34350).
    """
    return device.type == "cuda" and bool(addmm_activation) and capability(device)[0] in (9, 10)


def _cublaslt_unsupported(x: Tensor, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> str | None:
    return triton_unsupported(x=x) or cublaslt.unsupported(x, w1, b1, w2, product_dtype(x))


# ------------------------------------------------------------------------------------------------- the public function


def mlp(x: TensorOrDual, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> TensorOrDual:
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
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: a parameter has a tangent.
    """
    return _mlp(x, w1, b1, w2, b2)


def _check(x: TensorOrDual, w1: Tensor, b1: Tensor | None, w2: Tensor, b2: Tensor | None) -> None:
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


_mlp = DualOp(
    "mlp",
    ["x"],
    ["w1", "b1", "w2", "b2"],
    check=_check,
    reference=reference.mlp,
    tangent=reference.mlp_tangent,
    backends={
        "triton": Backend(_forward, lambda x, **_: triton_unsupported(x=x), wrapper=_wrapper),
        # right on an H100, and not timed yet
        "cublaslt": Backend(
            _forward, _cublaslt_unsupported, opt_in=True, wrapper=partial(_wrapper, backend="cublaslt")
        ),
    },
    derived=lambda x, **_: (product_dtype(x),),
)
