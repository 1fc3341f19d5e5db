"""What the trainer asks of a codec."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Codec(Protocol):
    """Images (B, C, H, W) in [-1, 1] to what the network trains on, of about unit size, and back.

    mean, std: of what `encode` gives, before it is normalised; for pixels 0 and 1.

    A codec whose latents are random has `draw(posterior, noise)` besides. Its `encode` gives the posterior instead, of
    twice the channels of `latent_shape`: means, then standard deviations.
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


def is_drawn(codec: Any) -> bool:
    """Whether latents are drawn from what `encode` gives."""
    return hasattr(codec, "draw")


def identity_of(codec: Any) -> Any:
    """What two codecs have in common that give the same latents, wherever their weights are."""
    return getattr(codec, "identity", codec)


def identified(codec: Any) -> Any:
    """A codec with the checksum of its weights, where it has weights."""
    return codec.identified() if hasattr(codec, "identified") else codec


def draw_latents(codec: Any, encoded: Tensor, noise: Tensor | None) -> Tensor:
    """Latents (B, C, H, W) of what `codec.encode` gave, with standard normal `noise` of their shape where they are
    drawn."""
    return codec.draw(encoded, noise) if is_drawn(codec) else encoded
