"""What a network trains on, made of images and turned back into them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from .options import Options
from .registry import register


class Codec(Protocol):
    """Images (B, C, H, W) in [-1, 1] to what the network trains on, of about unit size, and back.

    mean, std: of what `encode` gives, before it is normalised; for pixels 0 and 1.
    """

    @property
    def mean(self) -> float: ...

    @property
    def std(self) -> float: ...

    def latent_shape(self, image_shape: tuple[int, int, int]) -> tuple[int, int, int]:
        """(C, H, W) of what images of that shape become."""
        ...

    def encode(self, images: Tensor) -> Tensor: ...

    def decode(self, latents: Tensor) -> Tensor: ...


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
