from __future__ import annotations

from torch import nn

from .._torch import is_untouched
from ..dual import TensorOrDual, dual_aware, linear_map, split_map
from ..linear import Linear, linear
from .op import attention
from .projected import projected_attention


@dual_aware
class Attention(nn.Module):
    """Multi-head self-attention on Tensor | Dual; parameter names as timm's (`qkv`, `proj`).

    Args:
        dim: width D.
        num_heads: number of heads H, a divisor of D.
        qkv_bias: whether the joint projection has a bias.

    Raises:
        ValueError: `num_heads` does not divide `dim`.
    """

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads != 0:
            raise ValueError(f"num_heads: expected a divisor of dim = {dim}, got {num_heads}")
        self.num_heads = num_heads
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)

    def forward(self, x: TensorOrDual, *, add_bias: bool = True) -> TensorOrDual:
        """(B, N, D); without `add_bias` before the bias of `proj`, which the caller adds (see `ResidualStream`)."""
        if is_untouched(self.qkv, Linear):
            o = projected_attention(x, self.qkv.weight, self.qkv.bias, self.num_heads)  # [B, N, D]
        else:  # one that was put in its place, or has hooks
            H, d = self.num_heads, x.shape[-1] // self.num_heads
            q, k, v = split_map(lambda a: a.unflatten(-1, (3, H, d)).unbind(2), self.qkv(x))  # [B, N, H, d] each
            o = linear_map(lambda a: a.flatten(2), attention(q, k, v))  # [B, N, D]
        return self.proj(o) if add_bias else linear(o, self.proj.weight)
