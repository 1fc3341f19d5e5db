"""The affine baseline, and the one distribution whose average velocity is known in closed form."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from mfkernels import Linear, SiLU, TensorOrDual, TimestepEmbedder, dual_aware, split_map

from ..registry import register
from .dit import LabelEmbedder


@register("models", "Affine")
@dual_aware
class Affine(nn.Module):
    """Baseline u = A(r, t, y) z + b(r, t, y) with a diagonal A: all that a network can know of each pixel by itself.

    It can represent the average velocity of independent Gaussian pixels (see `gaussian_average_velocity`) and nothing
    that couples two pixels, so what a real network gains over it is what it learned of the image.

    Args:
        input_size: side of the image.
        in_channels: channels C.
        hidden_size: width of the embedding of t, t − r and y.
        num_classes: number of labels; label `num_classes` means "no label".

    Raises:
        ValueError: a size is less than 1; the message names it.
    """

    def __init__(self, input_size: int, in_channels: int, hidden_size: int = 64, num_classes: int = 1) -> None:
        super().__init__()
        self.config: dict[str, Any] = {
            "input_size": input_size,
            "in_channels": in_channels,
            "hidden_size": hidden_size,
            "num_classes": num_classes,
        }
        for name, size in self.config.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.final_layer = nn.Sequential(SiLU(), Linear(hidden_size, 2 * in_channels * input_size * input_size))
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> TensorOrDual:
        """The average velocity over [r, t] at z; arguments and result as `DiT.forward`."""
        image = (self.in_channels, self.input_size, self.input_size)
        if tuple(z.shape[1:]) != image:
            raise ValueError(f"z: expected shape (B, {', '.join(map(str, image))}), got {tuple(z.shape)}")
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # [B, D]
        A, b = split_map(lambda a: a.unflatten(1, (2, *image)).unbind(1), self.final_layer(c))  # [B, C, H, W] each
        return A * z + b


def gaussian_average_velocity(z: Tensor, r: Tensor, t: Tensor, mean: Tensor | float, std: Tensor | float) -> Tensor:
    """Average velocity of the straight path between Gaussian data and standard normal noise, in closed form.

    With x ~ N(mean, std²) per pixel and z_t = (1 − t) x + t e, the probability flow keeps (z_t − (1 − t)·mean)/σ_t
    constant, σ_t² = (1 − t)² std² + t², so u = (z_t − z_r)/(t − r) = A (z_t − (1 − t)·mean) − mean with
    A = (t + r + std² (t + r − 2)) / (σ_t (σ_t + σ_r)), which has no singularity at r = t.

    Args:
        z: (B, …) points at time t.
        r, t: (B,) times in [0, 1]; r = t gives the instantaneous velocity E[e − x | z_t].
        mean, std: numbers, or tensors that broadcast against z; std > 0.

    Returns:
        (B, …).
    """
    r, t = (a.view(-1, *[1] * (z.ndim - 1)) for a in (r, t))  # [B, 1, …]
    var = torch.as_tensor(std, dtype=z.dtype, device=z.device).square()
    sigma_t = ((1 - t).square() * var + t.square()).sqrt()
    sigma_r = ((1 - r).square() * var + r.square()).sqrt()
    A = (t + r + var * (t + r - 2)) / (sigma_t * (sigma_t + sigma_r))
    return A * (z - (1 - t) * mean) - mean
