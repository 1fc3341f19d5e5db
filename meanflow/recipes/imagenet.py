"""What recipes for ImageNet share: the data and the averages.

`data` stays the user's: a folder of latents or of images, `meanflow train NAME --data FOLDER`.
"""

from __future__ import annotations

from typing import Any

from ..config import Config

IMAGES = 1_281_167  # of the training set
EPOCH = 5005  # steps of 256 of them

LATENTS = (4, 32, 32)
PIXELS = (3, 64, 64)
LARGE_LATENTS = (4, 64, 64)
MSE = "ImageNet 256×256 as 4×32×32 latents of sd-vae-ft-mse"
EMA = "ImageNet 256×256 as 4×32×32 latents of sd-vae-ft-ema"
SMALL = "ImageNet 64×64 pixels"
LARGE = "ImageNet 512×512 as 4×64×64 latents of sd-vae-ft-mse"


def on_imagenet(name: str, **values: Any) -> Config:
    """A recipe: images mirrored, no clipping and an average of 0.9999, unless `values` say otherwise."""
    shared = {
        "flip": True,
        "grad_clip": 0.0,
        "ema_decay": 0.9999,
        "checkpoint_every": 5000,
        "sample_every": 5000,
    }
    return Config.of(name=run_name(name), **{**shared, **values})


def epochs_of(steps: int, batch_size: int) -> int:
    """Passes over the data, rounded."""
    return round(steps * batch_size / IMAGES)


def run_name(name: str) -> str:
    """A recipe's name as that of a folder: "DiT-XL/2+" is "DiT-XL-2-plus"."""
    return name.replace("/", "-").replace("+", "-plus")
