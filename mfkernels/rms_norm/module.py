from __future__ import annotations

import torch
from torch import nn

from ..dual import TensorOrDual, dual_aware
from .op import rms_norm


@dual_aware
class RMSNorm(nn.Module):
    """Root-mean-square norm of the last dimension, on Tensor | Dual; its one parameter is `weight`, as in torch.nn.

    Args:
        dim: width D.
        eps: added to the mean square.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: TensorOrDual) -> TensorOrDual:
        return rms_norm(x, self.weight, eps=self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
