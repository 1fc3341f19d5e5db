"""Named configurations for `meanflow train NAME`."""

from __future__ import annotations

from .training.config import TrainConfig

DIGITS = TrainConfig(
    data="digits",
    name="digits",
    held_out=0.2,
    model="DiT",
    hidden_size=128,
    depth=4,
    num_heads=4,
    patch_size=4,
    ratio=0.5,
    omega=1.0,
    kappa=0.3,
    steps=1000,
    batch_size=128,
    lr=2e-3,
    warmup_steps=50,
    schedule="cosine",
    ema_decay=0.999,
    device="cpu",
    # Two threads gain a fifth on two idle cores and are ten times slower when one core is busy (OpenMP's threads wait
    # for each other); one thread also gives the same numbers whatever the number of cores.
    threads=1,
    log_every=20,
    sample_every=250,
    checkpoint_every=250,
)

_EPOCH = 5005  # steps of 256 images in ImageNet's 1,281,167


def _authors(name: str, epochs: int, omega: float, kappa: float, interval: tuple[float, float]) -> TrainConfig:
    """Hyper-parameters of arXiv 2505.13447, table 4: batch 256, Adam at 1e-4, EMA 0.9999, a quarter of rows r ≠ t.

    The authors train on ImageNet as 4×32×32 latents of a VAE; here the data is the user's folder of images.
    """
    return TrainConfig(
        name=name.replace("/", "-"),
        model=name,
        ratio=0.25,
        omega=omega,
        kappa=kappa,
        guidance_interval=interval,
        steps=epochs * _EPOCH,
        batch_size=256,
        lr=1e-4,
        beta2=0.95,
        grad_clip=0.0,
        ema_decay=0.9999,
        checkpoint_every=5000,
        sample_every=5000,
    )


PRESETS: dict[str, TrainConfig] = {
    "digits": DIGITS,
    "DiT-B/4": _authors("DiT-B/4", epochs=80, omega=2.0, kappa=0.0, interval=(0.0, 1.0)),
    "DiT-B/2": _authors("DiT-B/2", epochs=240, omega=1.0, kappa=0.5, interval=(0.0, 1.0)),
    "DiT-M/2": _authors("DiT-M/2", epochs=240, omega=1.0, kappa=0.5, interval=(0.0, 1.0)),
    "DiT-L/2": _authors("DiT-L/2", epochs=240, omega=0.2, kappa=0.92, interval=(0.0, 0.8)),
    "DiT-XL/2": _authors("DiT-XL/2", epochs=240, omega=0.2, kappa=0.92, interval=(0.0, 0.75)),
}
