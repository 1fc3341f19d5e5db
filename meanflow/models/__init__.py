"""Backbones on Tensor | Dual."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn

from . import dit, imf_dit
from .affine import Affine, gaussian_average_velocity
from .dit import (
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
from .factory import config_of, is_factory, model_from_factory
from .imf_dit import IMFDiT, IMFDiT_B_2, IMFDiT_L_2, IMFDiT_M_2, IMFDiT_XL_2

NAMED: dict[str, partial[Any]] = {**dit.NAMED, **imf_dit.NAMED}
FAMILIES: dict[str, type[nn.Module]] = {"DiT": DiT, "Affine": Affine, "iMF-DiT": IMFDiT}


def create_model(name: str, **config: Any) -> nn.Module:
    """A backbone by name, with any of its sizes changed, or a network of yours.

    "DiT-B/2" (sizes S, B, M, L, XL; patches 2, 4, 8), "iMF-DiT-B/2" (sizes B, M, L, XL), or "DiT", "iMF-DiT" and the
    baseline "Affine" with every size given. "package.module:function" is what that function makes of the sizes,
    dualized (the contract: `meanflow.models.factory.model_from_factory`).

    Raises:
        ValueError: there is no model of that name.
    """
    if is_factory(name):
        return model_from_factory(name, config)
    classes: dict[str, Any] = {**FAMILIES, **NAMED}
    if name not in classes:
        raise ValueError(f'name: expected one of {", ".join(classes)} or "package.module:function", got {name!r}')
    return classes[name](**config)


def family_of(name: str) -> str:
    """The family of a model by name, which is built from sizes alone: "DiT" of "DiT-B/2".

    Raises:
        ValueError: there is no model of that name.
    """
    if name in FAMILIES:
        return name
    if name not in NAMED:
        raise ValueError(f"name: expected one of {', '.join([*FAMILIES, *NAMED])}, got {name!r}")
    return next(family for family, cls in FAMILIES.items() if cls is NAMED[name].func)


__all__ = [
    "FAMILIES",
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
    "IMFDiT",
    "IMFDiT_B_2",
    "IMFDiT_L_2",
    "IMFDiT_M_2",
    "IMFDiT_XL_2",
    "config_of",
    "create_model",
    "family_of",
    "gaussian_average_velocity",
    "is_factory",
]
