from __future__ import annotations

from typing import cast

from torch import Tensor, nn

from ..dual import TensorOrDual, dual_aware, linear_map
from ..linear import Linear
from ..silu import SiLU
from .op import timestep_embedding


@dual_aware
class TimestepEmbedder(nn.Module):
    """Scalar times to vectors: sinusoidal features, linear, SiLU, linear; parameter names as DiT's (`mlp.0`, `mlp.2`).

    Args:
        hidden_size: width D of the output.
        frequency_embedding_size: number of sinusoidal features, even.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        if hidden_size < 1:
            raise ValueError(f"hidden_size: expected at least 1, got {hidden_size}")
        if frequency_embedding_size < 2 or frequency_embedding_size % 2 != 0:
            raise ValueError(f"frequency_embedding_size: expected an even number >= 2, got {frequency_embedding_size}")
        self.frequency_embedding_size = frequency_embedding_size
        self.mlp = nn.Sequential(
            Linear(frequency_embedding_size, hidden_size), SiLU(), Linear(hidden_size, hidden_size)
        )

    def forward(self, t: TensorOrDual) -> TensorOrDual:
        features = timestep_embedding(t, self.frequency_embedding_size)  # [B, frequency_embedding_size]
        dtype = cast(Tensor, self.mlp[0].weight).dtype
        return self.mlp(linear_map(lambda a: a.to(dtype), features))  # [B, D]
