"""Recipes of Shortcut models (arXiv 2410.12557).

The commands for ImageNet in the README of github.com/kvfrans/shortcut-models at 6010043, with the defaults of its
`train.py`: batch 256, 810,000 steps, AdamW at a constant 1e-4 with β (0.9, 0.999) and weight decay 0.1, no clipping,
1 of 8 samples with a composed target (the paper says a quarter), steps down to 1/128, guidance scale 1.5 in the
targets, labels dropped with 0.1, targets by an average of 0.999, mirrored images, latents of sd-vae-ft-mse. FIDs: the
README's table.

The program keeps the average of 0.999 for its targets and by default evaluates the weights themselves (`use_ema`).
"""

from __future__ import annotations

from functools import partial

from ..config import Config
from ..registry import register
from .imagenet import LATENTS, MSE, epochs_of, on_imagenet
from .published import Published, PublishedRecipe


def authors(name: str) -> Config:
    """The README's command."""
    return on_imagenet(
        name,
        model=name.removeprefix("Shortcut-"),
        objective="shortcut",
        form="shortcut",
        ratio=0.125,
        timesteps=128,
        guidance=1.5,
        target_ema=0.999,
        ema_decay=0.999,
        steps=810_000,
        batch_size=256,
        lr=1e-4,
        beta2=0.999,
        weight_decay=0.1,
    )


for name, fid in (
    ("Shortcut-DiT-B/2", {"1": 40.3, "4": 28.3, "128": 15.5}),
    ("Shortcut-DiT-XL/2", {"1": 10.6, "4": 7.8, "128": 3.8}),
):
    reported = Published(
        paper="2410.12557",
        data=MSE,
        shape=LATENTS,
        protocol="50,000 samples in 1, 4 or 128 equal steps, without guidance in sampling",
        fid=fid,
        epochs=epochs_of(810_000, 256),
        table="README of kvfrans/shortcut-models",
        differs="The authors take the images of the composed samples twice and others not at all; here each once. "
        "Their program by default evaluates the weights without averaging; here samples are of the average, unless one "
        "says --weights raw.",
    )
    register("recipes", name)(PublishedRecipe(partial(authors, name), reported))
