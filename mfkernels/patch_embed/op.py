from __future__ import annotations

from torch import Tensor

from ..checks import check_operand, check_parameter, check_shape
from ..dual import TensorOrDual
from ..router import DualOp
from . import reference


def patch_embed(x: TensorOrDual, weight: Tensor, bias: Tensor | None = None) -> TensorOrDual:
    """Cut images into non-overlapping patches and project each to a token (arXiv 2010.11929, eq. 1).

    Args:
        x: (B, C, H, W) images, tensor or Dual.
        weight: (D, C, p, p), p a divisor of H and W.
        bias: (D,) or None.

    Returns:
        (B, H/p · W/p, D) tokens, row by row, of the kind of `x`.

    Raises:
        TypeError, ValueError: an argument does not fit; the message names it.
    """
    return _patch_embed(x, weight, bias)


def _check(x: TensorOrDual, weight: Tensor, bias: Tensor | None) -> None:
    check_operand("x", x, 4)
    check_parameter("weight", weight, 4, x)
    if x.shape[1] != weight.shape[1]:
        raise ValueError(f"x: expected {weight.shape[1]} channels (as weight has), got shape {tuple(x.shape)}")
    if 0 in weight.shape[2:]:
        raise ValueError(f"weight: expected patches of at least one pixel, got shape {tuple(weight.shape)}")
    if x.shape[2] % weight.shape[2] or x.shape[3] % weight.shape[3]:
        raise ValueError(f"x: expected height and width divisible by {tuple(weight.shape[2:])}, got {tuple(x.shape)}")
    if bias is not None:
        check_parameter("bias", bias, 1, x)
        check_shape("bias", bias, (weight.shape[0],), "(D,) of weight")


_patch_embed = DualOp(
    "patch_embed",
    ["x"],
    ["weight", "bias"],
    check=_check,
    reference=reference.patch_embed,
    tangent=reference.patch_embed_tangent,
)
