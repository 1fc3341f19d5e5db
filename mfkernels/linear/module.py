from __future__ import annotations

from torch import nn

from ..dual import TensorOrDual, dual_aware
from .op import linear


@dual_aware
class Linear(nn.Linear):
    """`torch.nn.Linear` on Tensor | Dual."""

    def forward(self, x: TensorOrDual) -> TensorOrDual:  # type: ignore[override]
        return linear(x, self.weight, self.bias)
