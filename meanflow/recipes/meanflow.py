"""Recipes of MeanFlow (arXiv 2505.13447, table 4).

The authors train on ImageNet as 4×32×32 latents of a VAE; here the data is the user's folder of images.
"""

from __future__ import annotations

from functools import partial

from ..config import Config
from ..registry import register

EPOCH = 5005  # steps of 256 images in ImageNet's 1,281,167


def authors(model: str, epochs: int, omega: float, kappa: float, interval: tuple[float, float]) -> Config:
    """Batch 256, Adam at 1e-4, EMA 0.9999, a quarter of the rows with r ≠ t."""
    return Config.of(
        name=model.replace("/", "-"),
        model=model,
        ratio=0.25,
        omega=omega,
        kappa=kappa,
        guidance_interval=interval,
        steps=epochs * EPOCH,
        batch_size=256,
        lr=1e-4,
        beta2=0.95,
        grad_clip=0.0,
        ema_decay=0.9999,
        checkpoint_every=5000,
        sample_every=5000,
    )


for model, epochs, omega, kappa, end in (
    ("DiT-B/4", 80, 2.0, 0.0, 1.0),
    ("DiT-B/2", 240, 1.0, 0.5, 1.0),
    ("DiT-M/2", 240, 1.0, 0.5, 1.0),
    ("DiT-L/2", 240, 0.2, 0.92, 0.8),
    ("DiT-XL/2", 240, 0.2, 0.92, 0.75),
):
    register("recipes", model)(partial(authors, model, epochs, omega, kappa, (0.0, end)))
