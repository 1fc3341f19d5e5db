"""Noise for samplers: back from one time to a noisier one, and where the random numbers come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating


def renoise(z: Tensor, r: float | Tensor, t: float | Tensor, noise: Tensor) -> Tensor:
    """A state z_r at the time r as one at a later, noisier time t: it has the law of z_t where z has that of z_r.

    On the path z_t = (1 − t) x + t e that is a·z + √(t² − a²r²)·noise with a = (1 − t)/(1 − r). With r = 0 it noises
    data: (1 − t)·x + t·noise.

    Args:
        z: (B, …) state at the time r.
        r, t: numbers, or (B,) tensors, 0 <= r <= t <= 1 and r < 1.
        noise: (B, …) standard normal noise.

    Returns:
        (B, …).

    Raises:
        ValueError: the times are numbers that are not in this order.
    """
    if not isinstance(r, Tensor) and not isinstance(t, Tensor) and not (0 <= r <= t <= 1 and r < 1):
        raise ValueError(f"r, t: expected 0 <= r <= t <= 1 and r < 1, got r={r} and t={t}")
    r_, t_ = (a.to(z.dtype).view(-1, *[1] * (z.ndim - 1)) if isinstance(a, Tensor) else a for a in (r, t))  # [B, 1, …]
    a = (1 - t_) / (1 - r_)
    spread: Any = ((t_ - r_) / (1 - r_) * (t_ + a * r_)) ** 0.5  # t − a·r without the cancellation near r = t
    return a * z + spread * noise


class Noises:
    """The noises of a stochastic sampler, one after the other.

    Args:
        like: (B, …) the state, whose shape and dtype they have, on its device.
        count: how many there are to be.
        generator: source of the draws, on any device; default: PyTorch's global one.
        given: the noises themselves.

    Raises:
        TypeError, ValueError: what was given does not fit; the message names it.
    """

    def __init__(
        self, like: Tensor, count: int, generator: torch.Generator | None, given: Sequence[Tensor] | None
    ) -> None:
        self.generator = generator
        self.given: Iterator[Tensor] | None = None
        if given is None:
            return
        if generator is not None:
            raise ValueError("generator, noises: expected one of them, got both")
        if len(given) != count:
            raise ValueError(f"noises: expected {count}, one between two steps, got {len(given)}")
        for i, noise in enumerate(given):
            check_floating(f"noises[{i}]", noise)
            if noise.shape != like.shape:
                shapes = f"{tuple(like.shape)}, got {tuple(noise.shape)}"
                raise ValueError(f"noises[{i}]: expected the shape of noise, {shapes}")
        self.given = iter(given)

    def next(self, z: Tensor) -> Tensor:
        """(B, …) noise for the state z."""
        if self.given is not None:
            return next(self.given).to(z)
        if self.generator is None:
            return torch.randn_like(z)
        place = self.generator.device  # so that a generator on the CPU gives every device the same images
        return torch.randn(z.shape, dtype=z.dtype, device=place, generator=self.generator).to(z.device)
