from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..backend import triton_unsupported
from ..checks import check_number, check_operand, check_shape
from ..dual import Dual
from ..forward_mode import carries_tangent
from ..operator import operator
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules


@operator("adaptive_squared_error_forward")
def _forward(
    u: Tensor, v: Tensor, correction: Tensor | None, interval: Tensor | None, p: float, eps: float, with_error: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, squared error and weight (B,) in float32, and u − target (B, …) where asked for, else no elements."""
    from .kernels import error_forward

    loss, squared_error, weight, error = error_forward(u, v, correction, interval, p=p, eps=eps, with_error=with_error)
    return loss, squared_error, weight, u.new_empty(0) if error is None else error


@_forward.register_fake
def _(u, v, correction, interval, p, eps, with_error):  # type: ignore[no-untyped-def]
    per_sample = (u.new_empty(u.shape[:1], dtype=torch.float32) for _ in range(3))
    return *per_sample, u.new_empty(u.shape if with_error else 0)


@operator("adaptive_squared_error_backward", outputs_like=("error",))
def _backward(dloss: Tensor, error: Tensor, weight: Tensor) -> Tensor:
    from .kernels import error_backward

    return error_backward(dloss, error, weight)


_forward.register_gradients(
    lambda ctx, dloss: (_backward(dloss, *ctx.saved_tensors),),
    save=lambda ctx, inputs, output: (output[3], output[2]),  # error, weight
)


def _wrapper(
    forward: Callable[..., tuple[Tensor, ...]],
    u: Tensor,
    _: None,
    v: Tensor,
    correction: Tensor | None,
    interval: Tensor | None,
    p: float,
    eps: float,
) -> tuple[Tensor, ...]:
    if correction is not None and correction.shape[0] == 0:
        correction = interval = None
    v, interval = v.detach(), None if interval is None else interval.detach()
    return forward(u, v, correction, interval, p, eps, torch.is_grad_enabled() and u.requires_grad)


# ------------------------------------------------------------------------------------------------- the public function


class AdaptiveSquaredError(NamedTuple):
    """per_sample: (B,) weighted errors, differentiable in u; squared_error: (B,) ‖u − target‖², detached."""

    per_sample: Tensor
    squared_error: Tensor


def adaptive_squared_error(
    u: Tensor,
    v: Tensor,
    correction: Tensor | None = None,
    interval: Tensor | None = None,
    *,
    p: float = 1.0,
    eps: float = 0.01,
) -> AdaptiveSquaredError:
    """Squared error e = ‖u − target‖² of each sample with a weight that falls with it, e / stopgrad(e + eps)^p.

    The target is v − interval·correction on the rows that have a correction, v on the others, and has no gradient. The
    weight is that of arXiv 2406.14548, eq. 8; MeanFlow (arXiv 2505.13447, eq. 22) has du/dt and t − r for correction
    and interval.

    Args:
        u: (B, …) prediction.
        v: (B, …) target before its correction.
        correction: (B_t, …), B_t <= B, of the first B_t rows, in the dtype of `u` and without gradient; None: no row.
        interval: (B,) or (B_t,) factors of the correction; None if and only if `correction` is.
        p: power >= 0 of the adaptive weight (0: plain squared error).
        eps: added to the squared error in it, > 0.

    Returns:
        `AdaptiveSquaredError(per_sample, squared_error)`, in float32 or better. The scalar loss is `per_sample.mean()`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
        BackendError: the requested backend cannot serve the call.
        NotImplementedError: an argument has a tangent.
    """
    if correction is not None and isinstance(correction, Tensor) and correction.requires_grad:
        raise ValueError("correction: expected a tensor without gradient, which the target has not; pass it detached")
    p, eps = check_number("p", p, 0), check_number("eps", eps, 0, above=True)
    return AdaptiveSquaredError(*_adaptive_squared_error(u, v, correction, interval, p, eps))


def _check(u: Tensor, v: Tensor, correction: Tensor | None, interval: Tensor | None) -> None:
    if (correction is None) != (interval is None):
        missing = "correction" if correction is None else "interval"
        raise ValueError(f"{missing}: expected a tensor, as the other of correction and interval is one, got None")
    given = {"u": u, "v": v}
    if correction is not None and interval is not None:
        given |= {"correction": correction, "interval": interval}
    for name, x in given.items():
        if isinstance(x, Dual):
            raise TypeError(f"{name}: expected a tensor, got a Dual; forward mode through the error is not supported")
        check_operand(name, x)
        if x.device != u.device:
            raise ValueError(f"{name}: expected the device of u, {u.device}, got {x.device}")
        if carries_tangent(x):
            raise NotImplementedError(f"{name}: forward mode through the error is not supported")
    if u.ndim < 2:
        raise ValueError(f"u: expected (B, …) with at least 2 dimensions, got shape {tuple(u.shape)}")
    check_shape("v", v, tuple(u.shape), "that of u")
    if correction is not None and interval is not None:
        _check_correction(u, correction, interval)


def _check_correction(u: Tensor, correction: Tensor, interval: Tensor) -> None:
    B, B_t = u.shape[0], correction.shape[0] if correction.ndim else 0
    if correction.shape[1:] != u.shape[1:] or correction.ndim != u.ndim or B_t > B:
        expected = f"(rows, {', '.join(map(str, u.shape[1:]))}) with at most {B} rows"
        raise ValueError(f"correction: expected shape {expected}, got {tuple(correction.shape)}")
    if correction.dtype != u.dtype:
        raise TypeError(f"correction: expected the dtype of u, {u.dtype}, got {correction.dtype}")
    if tuple(interval.shape) not in ((B,), (B_t,)):
        raise ValueError(f"interval: expected shape ({B},) or ({B_t},), got {tuple(interval.shape)}")


_adaptive_squared_error = DualOp(
    "adaptive_squared_error",
    ["u"],
    ["v", "correction", "interval"],
    check=_check,
    reference=reference.adaptive_squared_error,
    tangent=None,
    backends={"triton": Backend(_forward, triton_unsupported, wrapper=_wrapper)},
    outputs=(None, None),
)
