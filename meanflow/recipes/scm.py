"""Recipes of sCM's consistency training (sCT, arXiv 2410.11081), for other networks than the authors'.

Theirs are EDM2's U-Nets (280.2, 497.8, 777.6, 1119.4 and 1523.4 million parameters), which this library does not
have. Here the DiT of the nearest number takes their place, in patches of 4 pixels or of 2 by 2 numbers of the
latents: M (308) for S, L (459) for M and XL (677) for L; none is near XL and XXL. **No figure is published for these
networks.**

Everything else that there is an option for is that of tables 4 and 5 and appendix G there: batch 2048, 400,000 steps
on 64×64 pixels and 100,000 on latents of 512×512, Adam at 1e-4, 9e-5 and 8e-5 with β (0.9, 0.99), log-normal noise
levels (−1.0, 1.6) and (−0.8, 1.6), c = 0.1, 10,000 steps of tangent warm-up, labels dropped with 0.1 on latents and
not on pixels, images not mirrored, a second evaluation at the angle 1.1. σ_d is 0.5: latents are to be scaled to that
deviation.

There is no option for: the start from a diffusion model (`--init RUN` takes a flow of one's own); dropout (0.45 on
pixels, 0.25 and 0.35 on latents, at 16 and below); Adam's ε = 1e-11 (here PyTorch's); a learning rate that falls with
the root of the step from step 35,000 (pixels) and 70,000 (latents) on: here with half a cosine on pixels, and not on
latents. The authors' average is a power-function one of length 0.05: `meanflow sample RUN --weights power:0.05`.
"""

from __future__ import annotations

import math
from functools import partial

from ..config import Config
from ..objectives.pairs import SIGMA_MAX
from ..registry import register
from .imagenet import LARGE, LARGE_LATENTS, PIXELS, SMALL, epochs_of, on_imagenet
from .published import Published, PublishedRecipe

SIGMA_DATA = 0.5
MIDDLE = SIGMA_DATA * math.tan(1.1) / (1 + SIGMA_DATA * math.tan(1.1))  # the time of the angle 1.1


def shared(name: str, model: str, lr: float, steps: int) -> Config:
    """What both data sets have; the number of snapshots, eight, is this library's."""
    return on_imagenet(
        name,
        flip=False,
        model=model,
        objective="sct",
        sigma_data=SIGMA_DATA,
        form_sigma_data=SIGMA_DATA,
        normalisation=0.1,
        warm_up_steps=10_000,
        time_std=1.6,
        sample_times=(SIGMA_MAX, MIDDLE, 0.0),
        batch_size=2048,
        lr=lr,
        beta2=0.99,
        steps=steps,
        power_ema=(0.05, 0.1),
        power_ema_every=steps // 8,
    )


def of_pixels(name: str, model: str, lr: float, steps: int) -> Config:
    """Table 4."""
    return shared(name, model, lr, steps).replace(image_size=64, time_mean=-1.0, label_dropout=0.0, schedule="cosine")


def of_latents(name: str, model: str, lr: float, steps: int) -> Config:
    """Table 5."""
    return shared(name, model, lr, steps).replace(time_mean=-0.8, label_dropout=0.1)


for family, patch, make, data, shape, steps in (
    ("sCT", 4, of_pixels, SMALL, PIXELS, 400_000),
    ("sCT-512", 2, of_latents, LARGE, LARGE_LATENTS, 100_000),
):
    for ours, size, theirs, lr in (("M", "S", 280.2, 1e-4), ("L", "M", 497.8, 9e-5), ("XL", "L", 777.6, 8e-5)):
        model = f"DiT-{ours}/{patch}"
        name = f"{family}-{model}"
        reported = Published(
            paper="2410.11081",
            data=data,
            shape=shape,
            epochs=epochs_of(steps, 2048),
            protocol="50,000 samples in 1 or 2 evaluations, the second at the angle 1.1, of weights averaged with "
            "length 0.05 (--weights power:0.05)",
            differs=f"Not the authors' network: that is EDM2-{size} with {theirs:g} million parameters, and no figure "
            "is published for this one. Theirs starts from a diffusion model and has dropout, another schedule of the "
            "learning rate."
            + (
                " It wants latents of mean 0 and standard deviation 0.5 in each channel."
                if shape == LARGE_LATENTS
                else ""
            ),
        )
        register("recipes", name)(PublishedRecipe(partial(make, name, model, lr, steps), reported))
