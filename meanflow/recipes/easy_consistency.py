"""Recipes of easy consistency tuning (ECT, arXiv 2406.14548) on 64×64 pixels, for other networks than the authors'.

Theirs are EDM2's U-Nets S, M, L and XL (280.2, 497.8, 777.6 and 1119.4 million parameters), which this library does
not have. Here the DiT of the nearest number takes their place, in patches of 4 pixels: M/4 (308) for S, L/4 (459) for
M and XL/4 (677) for L; none is near XL. **No figure is published for these networks.**

Everything else that there is an option for is that of `run_imgnet_ecm.sh`, and of the presets and defaults of
`ct_train.py`, in github.com/locuslab/ect at 75aa88a (branch imgnet): batch 128, 12.8 million images, learning rates
1e-3, 9e-4 and 8e-4 with β (0.9, 0.99), q = 4, a stage of 500 ticks of 6,400 images, k = 8, b = 1, c = 0.06,
log-normal noise levels (−0.8, 1.6), EMA 0.9999, no dropped labels, images not mirrored, a second evaluation at the
noise level 1.526.

There is no option for: the start from EDM2's weights (`--init RUN` takes a flow of one's own); dropout (0.4 and 0.5
at 16 pixels and below); the weight (σ² + σ_d²)/(σ·σ_d)² (here 1/(σ_t − σ_s)); a learning rate that falls with the
root of the step from step 2000 on (here with half a cosine). The learning rates are for EDM2's normalised weights,
and nobody has tried them with a DiT.
"""

from __future__ import annotations

from functools import partial

from ..config import Config
from ..objectives.pairs import SIGMA_MAX
from ..registry import register
from .imagenet import PIXELS, SMALL, epochs_of, on_imagenet
from .published import Published, PublishedRecipe

MIDDLE = 1.526 / 2.526  # the time of that noise level


def authors(name: str, lr: float) -> Config:
    """The script's values, of the authors' size that this network takes the place of."""
    return on_imagenet(
        name,
        image_size=64,
        flip=False,
        model=name.removeprefix("ECT-"),
        objective="ect",
        stage_factor=4.0,
        stage_steps=25_000,
        gap_scale=8.0,
        gap_slope=1.0,
        huber=0.06,
        eval_sigma_min=0.0,
        label_dropout=0.0,
        time_mean=-0.8,
        time_std=1.6,
        sample_times=(SIGMA_MAX, MIDDLE, 0.0),
        steps=100_000,
        batch_size=128,
        lr=lr,
        schedule="cosine",
        beta2=0.99,
    )


for name, size, theirs, lr in (
    ("ECT-DiT-M/4", "S", 280.2, 1e-3),
    ("ECT-DiT-L/4", "M", 497.8, 9e-4),
    ("ECT-DiT-XL/4", "L", 777.6, 8e-4),
):
    reported = Published(
        paper="2406.14548",
        data=SMALL,
        shape=PIXELS,
        epochs=epochs_of(100_000, 128),
        protocol="50,000 samples in 1 or 2 evaluations, the second at σ = 1.526, of averaged weights",
        differs=f"Not the authors' network: that is EDM2-{size} with {theirs:g} million parameters, and no figure is "
        "published for this one. Theirs starts from EDM2's weights and has dropout, another weight of the loss and "
        "another schedule of the learning rate.",
    )
    register("recipes", name)(PublishedRecipe(partial(authors, name, lr), reported))
