from __future__ import annotations

import torch
from torch import Tensor

from ..backend import rows_unsupported
from ..checks import check_operand, check_rows, check_same, check_shape
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operators and their rules


@operator("swiglu_forward")
def _forward(a: Tensor, b: Tensor, a_dot: Tensor | None, b_dot: Tensor | None) -> tuple[Tensor, Tensor]:
    """y (B, …, D) and its tangent (B_t, …, D), B_t = 0 where there is none."""
    from .kernels import swiglu_forward

    y, y_dot = swiglu_forward(a, b, a_dot, b_dot)
    return y, tangent_or_empty(y_dot, y)


@_forward.register_fake
def _(a, b, a_dot, b_dot):  # type: ignore[no-untyped-def]
    y = a.new_empty(a.shape, dtype=torch.promote_types(a.dtype, b.dtype))
    return y, y.new_empty((num_tangent_rows(a_dot, b_dot), *a.shape[1:]))


@operator("swiglu_backward", outputs_like=("a", "b"))
def _backward(dy: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    from .kernels import swiglu_backward

    return swiglu_backward(dy, a, b)


_forward.register_gradients(
    lambda ctx, dy: _backward(dy, *ctx.saved_tensors), save=lambda ctx, inputs, output: inputs[:2]
)

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
        BackendError: the requested backend cannot serve the call.
    """
    return _swiglu(a, b)


def _check(a: TensorOrDual, b: TensorOrDual) -> None:
    check_rows("a", a)
    check_operand("b", b)
    check_shape("b", b, tuple(a.shape), "(B, …, D) of a")
    check_same("b", b, "a", a)


_swiglu = DualOp(
    "swiglu",
    ["a", "b"],
    check=_check,
    reference=reference.swiglu,
    tangent=reference.swiglu_tangent,
    backends={"triton": Backend(_forward, rows_unsupported)},
)
