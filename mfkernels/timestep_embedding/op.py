from __future__ import annotations

from numbers import Integral

from torch import Tensor

from ..backend import MAX_WIDTH, triton_unsupported
from ..checks import check_number, check_operand
from ..dual import TensorOrDual
from ..operator import num_tangent_rows, operator, tangent_or_empty
from ..router import Backend, DualOp
from . import reference

# ------------------------------------------------------------------------------------------- operator and its rules


@operator("timestep_embedding_forward")
def _forward(t: Tensor, t_dot: Tensor | None, dim: int, max_period: float) -> tuple[Tensor, Tensor]:
    """(B, dim) and its tangent (B_t, dim), B_t = 0 where there is none."""
    from .kernels import embedding_forward

    out, out_dot = embedding_forward(t, t_dot, dim, max_period)
    return out, tangent_or_empty(out_dot, out)


@_forward.register_fake
def _(t, t_dot, dim, max_period):  # type: ignore[no-untyped-def]
    return t.new_empty((t.shape[0], dim)), t.new_empty((num_tangent_rows(t_dot), dim))


@operator("timestep_embedding_backward", outputs_like=("t",))
def _backward(dout: Tensor, t: Tensor, max_period: float) -> Tensor:
    from .kernels import embedding_backward

    return embedding_backward(dout, t, max_period)


def _saved(ctx, inputs, output):  # type: ignore[no-untyped-def]
    t, _, _, ctx.max_period = inputs
    return (t,)


_forward.register_gradients(lambda ctx, dout: (_backward(dout, *ctx.saved_tensors, ctx.max_period),), save=_saved)


def _triton_unsupported(t: Tensor, dim: int) -> str | None:
    reason = triton_unsupported(t=t)
    if reason is None and dim > MAX_WIDTH:
        reason = f"dim: expected at most {MAX_WIDTH}, got {dim}"
    return reason


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
        BackendError: the requested backend cannot serve the call.
    """
    if not isinstance(dim, Integral) or dim < 2 or dim % 2 != 0:
        raise ValueError(f"dim: expected an even integer >= 2, got {dim}")
    return _timestep_embedding(t, int(dim), check_number("max_period", max_period, 1, above=True))


def _check(t: TensorOrDual, dim: int) -> None:
    check_operand("t", t, 1)


_timestep_embedding = DualOp(
    "timestep_embedding",
    ["t"],
    ["dim"],
    check=_check,
    reference=reference.timestep_embedding,
    tangent=reference.timestep_embedding_tangent,
    backends={"triton": Backend(_forward, _triton_unsupported)},
)
