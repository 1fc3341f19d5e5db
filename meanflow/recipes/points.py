"""2-D points: half a minute of one core."""

from __future__ import annotations

from ..config import Config
from ..registry import register


@register("recipes", "points")
def points() -> Config:
    """MeanFlow of an MLP on two moons."""
    return Config.of(
        data="points",
        shape="moons",
        held_out=0.2,
        name="points",
        model="MLP",
        hidden_size=128,
        depth=3,
        ratio=0.75,
        omega=1.0,
        kappa=0.0,
        norm_p=0.0,
        time_sampler="uniform",
        steps=1200,
        batch_size=256,
        lr=4e-3,
        warmup_steps=50,
        schedule="cosine",
        ema_decay=0.99,
        evaluator="points",
        device="cpu",
        threads=1,
        log_every=50,
        sample_every=600,
        checkpoint_every=600,
    )
