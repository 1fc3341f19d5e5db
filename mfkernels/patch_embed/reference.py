"""Non-overlapping patches to tokens: one product with each patch laid out as a row; the bias is the primal's alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # not a convolution: cuDNN's are in TF32 by default, and give tokens that are not contiguous
    p, q = weight.shape[2:]
    patches = x.unflatten(3, (-1, q)).unflatten(2, (-1, p)).permute(0, 2, 4, 1, 3, 5)  # [B, H/p, W/q, C, p, q]
    return F.linear(patches.flatten(3).flatten(1, 2), weight.flatten(1), bias)  # [B, N, D], N row by row


def patch_embed_tangent(x: Tensor, x_dot: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return patch_embed(x_dot, weight, None)  # [B_t, N, D]
