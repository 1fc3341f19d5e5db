"""No codec: the network trains on pixels."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..options import Options
from ..registry import register


@register("codecs", "pixels")
@dataclass(frozen=True)
class Pixels(Options):
    """Pixels as they are."""

    mean = 0.0
    std = 1.0

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W), as it is."""
        return image_shape

    def encode(self, images: Tensor) -> Tensor:
        """(B, C, H, W), as they are."""
        return images

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, H, W), as they are."""
        return latents
