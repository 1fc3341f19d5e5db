"""Recipes of MeanFlow (arXiv 2505.13447).

Model, epochs, guidance and its interval: table 4 there. Batch 256, Adam (weight decay 0) at a constant 1e-4 with β
(0.9, 0.95), EMA 0.9999, a quarter of the samples with r ≠ t, times of the logit-normal (−0.4, 1), p = 1, labels
dropped with 0.1: table 4 and `configs/default.py` of github.com/Gsunshine/meanflow at d70cb55, which also has c =
0.01, 4×32×32 latents of the VAE "mse", mirrored images and no clipping of gradients. FIDs: table 2, and table 1f for
B/4, which is the model of the ablations and has no guidance of its own in table 4 (its row here is ω = 2, κ = 0).

XL/2+ is XL/2 with more epochs and another guidance; its FID is of two evaluations.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import Config
from ..registry import register
from .imagenet import EPOCH, LATENTS, MSE, on_imagenet
from .published import Published, PublishedRecipe


def authors(
    name: str, epochs: int, omega: float, kappa: float, interval: tuple[float, float], sample_steps: int
) -> Config:
    """Table 4; guidance is in the target, so that sampling has none."""
    return on_imagenet(
        name,
        model=name.removesuffix("+"),
        ratio=0.25,
        omega=omega,
        kappa=kappa,
        guidance_interval=interval,
        steps=epochs * EPOCH,
        batch_size=256,
        lr=1e-4,
        beta2=0.95,
        sample_steps=sample_steps,
    )


Rows = tuple[tuple[str, float, int, float, float, tuple[float, float], Mapping[str, float], str], ...]

# name, parameters in millions, epochs, omega, kappa, guided times, FID by evaluations, its table
ROWS: Rows = (
    ("DiT-B/4", 131, 80, 2.0, 0.0, (0.0, 1.0), {"1": 20.15}, "table 1f"),
    ("DiT-B/2", 131, 240, 1.0, 0.5, (0.0, 1.0), {"1": 6.17}, "table 2"),
    ("DiT-M/2", 308, 240, 1.0, 0.5, (0.0, 1.0), {"1": 5.01}, "table 2"),
    ("DiT-L/2", 459, 240, 0.2, 0.92, (0.0, 0.8), {"1": 3.84}, "table 2"),
    ("DiT-XL/2", 676, 240, 0.2, 0.92, (0.0, 0.75), {"1": 3.43, "2": 2.93}, "table 2"),
    ("DiT-XL/2+", 676, 1000, 1.0, 0.5, (0.3, 0.8), {"2": 2.20}, "table 2"),
)
for name, parameters, epochs, omega, kappa, interval, fid, table in ROWS:
    make = partial(authors, name, epochs, omega, kappa, interval, 1 if "1" in fid else 2)
    reported = Published(
        paper="2505.13447",
        data=MSE,
        shape=LATENTS,
        protocol="50,000 samples in 1 or 2 equal steps, without guidance in sampling, of the averaged weights",
        fid=fid,
        table=table,
        epochs=epochs,
        parameters=parameters,
    )
    register("recipes", name)(PublishedRecipe(make, reported))
