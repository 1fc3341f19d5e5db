"""The network of decoupled MeanFlow (arXiv 2510.24474): a DiT whose first blocks are told t, and whose last ones r."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor

from mfkernels import TensorOrDual, dual_aware
from mfkernels.checks import check_number

from ..registry import register
from .dit import DiT


@register("models", "DMF-DiT")
@dual_aware
class DMFDiT(DiT):
    """A DiT that becomes a flow map without a new parameter: the first `split` of its blocks are told t, the others r.

    Both times go through one embedder, so that with r = t it is the network of flow matching whose weights it takes.

    Args:
        split: share of the blocks that are told t, in [0, 1]; 20 of 28 in the paper.
        others: as `DiT`.

    Raises:
        ValueError: a size does not fit; the message names it.
    """

    embeds_gap: ClassVar[bool] = False

    def __init__(
        self,
        input_size: int = 32,
        patch_size: int = 2,
        in_channels: int = 4,
        hidden_size: int = 1152,
        depth: int = 28,
        num_heads: int = 16,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        split: float = 5 / 7,
    ) -> None:
        super().__init__(input_size, patch_size, in_channels, hidden_size, depth, num_heads, mlp_ratio, num_classes)
        self.config["split"] = check_number("split", split, 0)
        if split > 1:
            raise ValueError(f"split: expected a share in [0, 1], got {split}")
        self.split_depth = round(depth * split)

    def conditioning(self, r: TensorOrDual, t: TensorOrDual, y: Tensor) -> Sequence[TensorOrDual]:
        """What each block is told, and then the last layer, (B, D) each."""
        label = self.y_embedder(y)  # [B, D]
        first, last = self.t_embedder(t) + label, self.t_embedder(r) + label  # [B, D] each
        return [first] * self.split_depth + [last] * (len(self.blocks) + 1 - self.split_depth)
