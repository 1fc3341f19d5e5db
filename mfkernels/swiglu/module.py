from __future__ import annotations

from torch import nn

from ..dual import TensorOrDual, dual_aware
from ..linear import Linear
from .op import swiglu


@dual_aware
class SwiGLU(nn.Module):
    """The feed-forward network y = w2(silu(w1 x) ∘ w3 x), on Tensor | Dual; names as in LLaMA and improved MeanFlow.

    Args:
        in_features: width D of input and output.
        hidden_features: width of the hidden layer (customarily 8/3 of D, so that it costs what a 4·D MLP does).
        bias: whether the three projections have biases.
    """

    def __init__(self, in_features: int, hidden_features: int, bias: bool = False) -> None:
        super().__init__()
        self.w1 = Linear(in_features, hidden_features, bias=bias)
        self.w2 = Linear(hidden_features, in_features, bias=bias)
        self.w3 = Linear(in_features, hidden_features, bias=bias)

    def forward(self, x: TensorOrDual) -> TensorOrDual:
        return self.w2(swiglu(self.w1(x), self.w3(x)))  # [B, …, D]
