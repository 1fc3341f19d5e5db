"""A small residual MLP, for points and tiny images."""

from __future__ import annotations

from torch import Tensor, nn

from mfkernels import Linear, SiLU, TensorOrDual, TimestepEmbedder, dual_aware, linear_map

from ..registry import register
from .dit import LabelEmbedder, arguments, check_inputs


@dual_aware
class MLPBlock(nn.Module):
    """h + W·SiLU(h + conditions), on Tensor | Dual."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.modulation = Linear(hidden_size, hidden_size)
        self.act = SiLU()
        self.linear = Linear(hidden_size, hidden_size)

    def forward(self, h: TensorOrDual, c: TensorOrDual) -> TensorOrDual:
        """(B, D) of h and c (B, D)."""
        return h + self.linear(self.act(h + self.modulation(c)))


@register("models", "MLP")
@dual_aware
class MLP(nn.Module):
    """Residual MLP on all values of z at once, conditioned on t, t − r and y; for 2-D points and tiny images.

    Conditions are added to features and never multiply them, so that ‖∂u/∂z‖ is at most the product of the spectral
    norms of `x_proj` and `final_layer` and of 1 + 1.1·σ of each block's `linear` (SiLU's slope is at most 1.1): with
    `spectral_norm` 2.1^depth. It starts at u = 0.

    Args:
        input_size: side of the image; 1 for points.
        in_channels: channels C; of points their dimension.
        hidden_size: width D.
        depth: number of blocks.
        num_classes: number of labels; label `num_classes` means "no label".

    Raises:
        ValueError: a size is less than 1 (`depth`: than 0); the message names it.
    """

    def __init__(
        self, input_size: int, in_channels: int, hidden_size: int = 128, depth: int = 3, num_classes: int = 1
    ) -> None:
        super().__init__()
        self.config = arguments(locals())
        for name, size in self.config.items():
            least = 0 if name == "depth" else 1
            if size < least:
                raise ValueError(f"{name}: expected at least {least}, got {size}")
        self.input_size, self.in_channels, self.num_classes = input_size, in_channels, num_classes
        values = in_channels * input_size * input_size
        self.x_proj = Linear(values, hidden_size)
        self.t_embedder = TimestepEmbedder(hidden_size)
        self.r_embedder = TimestepEmbedder(hidden_size)
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        self.act = SiLU()
        self.blocks = nn.ModuleList(MLPBlock(hidden_size) for _ in range(depth))
        self.final_layer = Linear(hidden_size, values)
        for parameter in self.final_layer.parameters():
            nn.init.zeros_(parameter)

    def forward(self, z: TensorOrDual, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> TensorOrDual:
        """The average velocity over [r, t] at z; arguments, result and errors as `DiT.forward`."""
        image = (self.in_channels, self.input_size, self.input_size)
        check_inputs(z, r, t, y, image)
        c = self.act(self.t_embedder(t) + self.r_embedder(t - r) + self.y_embedder(y))  # [B, D]
        h = self.x_proj(linear_map(lambda a: a.flatten(1), z))  # [B, D]
        for block in self.blocks:
            h = block(h, c)  # [B, D]
        # clone: FSDP2 warns of a module that returns a view
        return linear_map(lambda a: a.unflatten(1, image).clone(), self.final_layer(h))  # [B, C, H, W]
