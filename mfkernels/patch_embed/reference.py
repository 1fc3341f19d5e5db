"""Non-overlapping patches to tokens: a convolution whose stride is its kernel; the bias is the primal's alone."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def patch_embed(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = F.conv2d(x, weight, bias, stride=weight.shape[2:])  # [B, D, H/p, W/p]
    return y.flatten(2).transpose(1, 2)  # [B, N, D], N row by row


def patch_embed_tangent(x_dot: Tensor, weight: Tensor) -> Tensor:
    return patch_embed(x_dot, weight, None)  # [B_t, N, D]
