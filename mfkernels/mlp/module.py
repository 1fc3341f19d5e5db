from __future__ import annotations

from torch import nn

from ..dual import TensorOrDual, dual_aware
from .op import mlp


@dual_aware
class Mlp(nn.Module):
    """The transformer's feed-forward network with tanh-GELU, on Tensor | Dual; names as timm's (`fc1`, `fc2`).

    Args:
        in_features: width D of input and output.
        hidden_features: width of the hidden layer.
    """

    def __init__(self, in_features: int, hidden_features: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(in_features, hidden_features)
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: TensorOrDual, *, add_bias: bool = True) -> TensorOrDual:
        """(B, …, D); without `add_bias` before the bias of `fc2`, which the caller adds (see `ResidualStream`)."""
        return mlp(x, self.fc1.weight, self.fc1.bias, self.fc2.weight, self.fc2.bias if add_bias else None)
