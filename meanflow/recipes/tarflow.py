"""TarFlow (arXiv 2412.06329) on 8×8 digits."""

from __future__ import annotations

from ..config import Config
from ..registry import register
from .digits import digits


@register("recipes", "digits-tarflow")
def digits_tarflow() -> Config:
    """A normalizing flow, by its likelihood, in three minutes.

    noise_std 0.2 is more than a grey level (0.125): with 0.1 the distance was larger at the same class accuracy.
    Guidance trades distance for class accuracy; where it does not grow from patch to patch less of it is enough.

    Seeds 0 to 2: class accuracy 0.999, 0.999 and 0.997, Fréchet distance 0.78, 0.87 and 0.77 (at guidance scale 1.5
    0.999, 1.000 and 0.996, and 0.55, 0.59 and 0.52; without guidance 0.97, 0.98 and 0.96, and 0.33, 0.35 and 0.30).
    Chosen on seed 10. 160 s of one core.
    """
    return digits().replace(
        name="digits-tarflow",
        model="TarFlow",
        hidden_size=64,
        head_dim=32,
        depth=4,
        layers_per_block=2,
        patch_size=2,
        objective="tarflow",
        noise_std=0.2,
        sample_guidance_scale=1.75,
        sample_annealed=False,
        steps=1200,
        batch_size=64,
        lr=4e-3,
        warmup_steps=50,
        ema_decay=0.99,
    )
