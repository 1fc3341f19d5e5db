from __future__ import annotations

from torch import nn

from ..dual import TensorOrDual, dual_aware
from .op import silu


@dual_aware
class SiLU(nn.Module):
    """`torch.nn.SiLU` on Tensor | Dual."""

    def forward(self, x: TensorOrDual) -> TensorOrDual:
        return silu(x)
