from __future__ import annotations

from torch import nn

from ..dual import TensorOrDual, dual_aware
from .op import patch_embed


@dual_aware
class PatchEmbed(nn.Module):
    """Images to tokens on Tensor | Dual; parameter names as timm's (`proj`).

    Args:
        patch_size: side p of a patch.
        in_channels: channels C of the image.
        embed_dim: width D of a token.
    """

    def __init__(self, patch_size: int, in_channels: int, embed_dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: TensorOrDual) -> TensorOrDual:
        return patch_embed(x, self.proj.weight, self.proj.bias)  # [B, N, D]
