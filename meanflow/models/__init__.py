"""Backbones on Tensor | Dual."""

from __future__ import annotations

from typing import Any

from torch import nn

from .affine import Affine, gaussian_average_velocity
from .dit import (
    NAMED,
    DiT,
    DiT_B_2,
    DiT_B_4,
    DiT_B_8,
    DiT_L_2,
    DiT_L_4,
    DiT_L_8,
    DiT_M_2,
    DiT_M_4,
    DiT_M_8,
    DiT_S_2,
    DiT_S_4,
    DiT_S_8,
    DiT_XL_2,
    DiT_XL_4,
    DiT_XL_8,
    DiTBlock,
    FinalLayer,
)


def create_model(name: str, **config: Any) -> nn.Module:
    """A backbone by name: "DiT-B/2" (sizes S, B, M, L, XL; patches 2, 4, 8), "DiT" or "Affine" with every size given.

    Raises:
        ValueError: there is no model of that name.
    """
    classes: dict[str, Any] = {"DiT": DiT, "Affine": Affine, **NAMED}
    if name not in classes:
        raise ValueError(f"name: expected one of {', '.join(classes)}, got {name!r}")
    return classes[name](**config)


__all__ = [
    "NAMED",
    "Affine",
    "DiT",
    "DiTBlock",
    "DiT_B_2",
    "DiT_B_4",
    "DiT_B_8",
    "DiT_L_2",
    "DiT_L_4",
    "DiT_L_8",
    "DiT_M_2",
    "DiT_M_4",
    "DiT_M_8",
    "DiT_S_2",
    "DiT_S_4",
    "DiT_S_8",
    "DiT_XL_2",
    "DiT_XL_4",
    "DiT_XL_8",
    "FinalLayer",
    "create_model",
    "gaussian_average_velocity",
]
