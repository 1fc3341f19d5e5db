"""Recipes of improved MeanFlow (arXiv 2512.02012 and its program).

The number of epochs is published for B/2; the larger sizes take over its 640. The guidance of the samples is the one
that the authors evaluate with. As in `meanflow`, the data is the user's folder of images.
"""

from __future__ import annotations

from functools import partial

from ..config import Config
from ..registry import register
from .meanflow import EPOCH


def authors(model: str, omega: float, interval: tuple[float, float]) -> Config:
    """Batch 1024, Adam at 1e-4 after 10 epochs of warm-up, EMA 0.9999."""
    return Config.of(
        name=model.replace("/", "-"),
        model=model,
        objective="imf",
        steps=640 * EPOCH // 4,
        batch_size=1024,
        lr=1e-4,
        warmup_steps=10 * EPOCH // 4,
        beta2=0.95,
        grad_clip=0.0,
        ema_decay=0.9999,
        checkpoint_every=5000,
        sample_every=5000,
        sample_omega=omega,
        sample_interval=interval,
    )


for model, omega, interval in (
    ("iMF-DiT-B/2", 8.0, (0.4, 0.65)),
    ("iMF-DiT-M/2", 10.5, (0.4, 0.6)),
    ("iMF-DiT-L/2", 10.5, (0.4, 0.6)),
    ("iMF-DiT-XL/2", 8.0, (0.42, 0.62)),
):
    register("recipes", model)(partial(authors, model, omega, interval))
