"""TarFlow (arXiv 2412.06329) on 8×8 digits."""

from __future__ import annotations

from ..config import Config
from ..registry import register
from .digits import digits


@register("recipes", "digits-tarflow")
def digits_tarflow() -> Config:
    """A normalizing flow, by its likelihood, in three minutes."""
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
