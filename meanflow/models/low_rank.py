"""The low-rank baseline: `Affine`, and a coupling of all values through a few directions."""

from __future__ import annotations

from torch import Tensor, nn

from mfkernels import Linear, SiLU, TensorOrDual, TimestepEmbedder, dual_aware, linear_map, split_map

from ..registry import register
from .dit import LabelEmbedder, arguments, check_inputs


@register("models", "LowRank")
@dual_aware
class LowRank(nn.Module):
    """Baseline u = A z + V (s ∘ Wᵀz) + b with diagonal A: `Affine`, and pixels coupled through `rank` directions.

    A, s and b depend on r, t and y; V and W (C·H·W × rank) do not.

    It can represent the average velocity of Gaussian data whose covariance is a multiple of the identity plus a matrix
    of rank `rank`, whose eigenvectors are the columns of V and W. Every block of ∂u/∂z that has none of its diagonal is
    of rank `rank` at most. It starts at u = 0.

    Args:
        input_size: side of the image.
        in_channels: channels C.
        hidden_size: width of the embedding of t, t − r and y.
        rank: number of directions.
        num_classes: number of labels; label `num_classes` means "no label".

    Raises:
        ValueError: a size is less than 1, or the rank larger than C·H·W; the message names it.
    """

    def __init__(
        self, input_size: int, in_channels: int, hidden_size: int = 64, rank: int = 1, num_classes: int = 1
    ) -> None:
        super().__init__()
        self.config = arguments(locals())
        for name, size in self.config.items():
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        values = in_channels * input_size * input_size
        if rank > values:
            raise ValueError(f"rank: expected at most the {values} values of an image, got {rank}")
        self.input_size, self.in_channels, self.rank, self.num_classes = input_size, in_channels, rank, num_classes
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.down = Linear(values, rank, bias=False)  # Wᵀ
        self.up = Linear(rank, values, bias=False)  # V
        self.final_layer = nn.Sequential(SiLU(), Linear(hidden_size, 2 * values + rank))
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> TensorOrDual:
        """The average velocity over [r, t] at z; arguments, result and errors as `DiT.forward`."""
        image = (self.in_channels, self.input_size, self.input_size)
        check_inputs(z, r, t, y, image)
        c = self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y)  # [B, D]
        s, Ab = split_map(
            lambda a: (a[:, : self.rank], a[:, self.rank :]), self.final_layer(c)
        )  # [B, rank], [B, 2·C·H·W]
        A, b = split_map(lambda a: a.unflatten(1, (2, *image)).unbind(1), Ab)  # [B, C, H, W] each
        coupled = self.up(s * self.down(linear_map(lambda a: a.flatten(1), z)))  # [B, C·H·W]
        return A * z + linear_map(lambda a: a.unflatten(1, image), coupled) + b
