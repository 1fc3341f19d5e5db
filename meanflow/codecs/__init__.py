"""What a network trains on, made of images and turned back into them."""

from .autoencoder import Autoencoder, absolute_if_there
from .codec import Codec, draw_latents, identified, identity_of, is_drawn
from .pixels import Pixels

__all__ = [
    "Autoencoder",
    "Codec",
    "Pixels",
    "absolute_if_there",
    "draw_latents",
    "identified",
    "identity_of",
    "is_drawn",
]
