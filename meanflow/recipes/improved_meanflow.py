"""Recipes of improved MeanFlow (arXiv 2512.02012).

640 epochs in batches of 1024, Adam (weight decay 0) at a constant 1e-4 after 10 epochs of warm-up with β₂ = 0.95, EMA
0.9999, half of the samples with r ≠ t, times of the logit-normal (−0.4, 1): table 4 there, and
`configs/train_config.yml` and `default.py` of github.com/Lyy-iiis/imeanflow at bf60cd7, which also have labels
dropped with 0.1, p = 1, c = 0.01, guidance scales up to 8, mirrored images, no clipping of gradients, and v heads of
8 blocks. The paper draws guidance scales with β = 1 or 2 and does not say which for which size; 1 is the program's.

The guidance of the samples is the one of `configs/eval_config.yml`, for one evaluation; XL/2 in two evaluations has ω
= 4 on [0.36, 0.64]. Parameters (without v head) and FIDs in one evaluation: table 2; in two: table 3.
"""

from __future__ import annotations

from functools import partial

from ..config import Config
from ..registry import register
from .imagenet import EPOCH, LATENTS, MSE, on_imagenet
from .published import Published, PublishedRecipe

EPOCHS = 640


def authors(model: str, omega: float, interval: tuple[float, float]) -> Config:
    """Table 4."""
    return on_imagenet(
        model,
        model=model,
        objective="imf",
        steps=EPOCHS * EPOCH // 4,
        batch_size=1024,
        lr=1e-4,
        warmup_steps=10 * EPOCH // 4,
        beta2=0.95,
        sample_omega=omega,
        sample_interval=interval,
    )


for model, parameters, omega, interval, fid in (
    ("iMF-DiT-B/2", 89, 8.0, (0.4, 0.65), {"1": 3.39}),
    ("iMF-DiT-M/2", 174, 10.5, (0.4, 0.6), {"1": 2.27}),
    ("iMF-DiT-L/2", 409, 10.5, (0.4, 0.6), {"1": 1.86}),
    ("iMF-DiT-XL/2", 610, 8.0, (0.42, 0.62), {"1": 1.72, "2": 1.54}),
):
    protocol = f"50,000 samples in 1 step, told ω = {omega:g} on [{interval[0]:g}, {interval[1]:g}]"
    if "2" in fid:
        protocol += "; in 2 steps, told ω = 4 on [0.36, 0.64]"
    reported = Published(
        paper="2512.02012",
        data=MSE,
        shape=LATENTS,
        protocol=f"{protocol}; of the averaged weights",
        fid=fid,
        table="tables 2 and 3" if "2" in fid else "table 2",
        epochs=EPOCHS,
        parameters=parameters,
        differs="The paper's parameters are without the v head, which training has and sampling has not.",
    )
    register("recipes", model)(PublishedRecipe(partial(authors, model, omega, interval), reported))
