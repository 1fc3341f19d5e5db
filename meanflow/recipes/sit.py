"""Recipes of SiT's flow matching (arXiv 2401.08740): the linear path and the velocity.

Batch 256, AdamW at a constant 1e-4 without weight decay, its β left as they are (0.9, 0.999), no clipping, mirrored
images, EMA 0.9999, labels dropped with 0.1, uniform times: appendix E there, and `train.py` and `transport` of
github.com/willisma/SiT at 947f95b (whose VAE is "ema"). 400,000 steps, and 7,000,000 for XL/2: tables 1 and 7.
Parameters: table 1. FIDs: table 8 without guidance, table 7 with guidance scale 1.5.

Images are drawn by the paper's ODE sampler, Heun's method from noise to data in 125 steps, which is its 250
evaluations (appendix D). The better figures are of its SDE sampler, 250 Euler-Maruyama steps of a diffusion that it
tunes to a bound of the divergence, w = KL,η, which there is not here; `--sampler sde` has the others of its table 6.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

from ..config import Config
from ..registry import register
from .imagenet import EMA, LATENTS, epochs_of, on_imagenet
from .published import Published, PublishedRecipe


def authors(name: str, steps: int, guidance_scale: float) -> Config:
    """Appendix E."""
    return on_imagenet(
        name,
        model=name.replace("SiT", "DiT"),
        objective="flow_matching",
        time_sampler="uniform",
        label_dropout=0.1,
        steps=steps,
        batch_size=256,
        lr=1e-4,
        beta2=0.999,
        sampler="ode",
        sample_method="heun",
        sample_steps=125,
        sample_guidance_scale=guidance_scale,
    )


ROWS: tuple[tuple[str, float, int, float, Mapping[str, float], str], ...] = (
    ("SiT-S/2", 33, 400_000, 1.0, {"250": 58.97, "250, SDE": 57.64}, "table 8"),
    ("SiT-B/2", 130, 400_000, 1.0, {"250": 34.84, "250, SDE": 33.02}, "table 8"),
    ("SiT-L/2", 458, 400_000, 1.0, {"250": 20.01, "250, SDE": 18.79}, "table 8"),
    ("SiT-XL/2", 675, 7_000_000, 1.5, {"250×2": 2.15, "250×2, SDE": 2.06}, "table 7"),
)
for name, parameters, steps, scale, fid, table in ROWS:
    guidance = f"guidance scale {scale:g}" if scale != 1.0 else "without guidance"
    reported = Published(
        paper="2401.08740",
        data=EMA,
        shape=LATENTS,
        protocol=f"50,000 samples by Heun's method in 125 steps (or by 250 steps of an SDE), {guidance}, of the "
        "averaged weights; FID to the training set by ADM's program",
        fid=fid,
        table=table,
        epochs=epochs_of(steps, 256),
        parameters=parameters,
        differs="The network is told t − r besides, which is 0 in training. The authors' program guides three of the "
        "four channels; here all are. Its loss is the mean over the numbers of a sample, here the sum.",
    )
    register("recipes", name)(PublishedRecipe(partial(authors, name, steps, scale), reported))
