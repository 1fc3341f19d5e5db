"""Backbones on Tensor | Dual."""

from __future__ import annotations

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
from .dmf_dit import DMFDiT
from .factory import config_of, create_model
from .imf_dit import IMFDiT, IMFDiT_B_2, IMFDiT_L_2, IMFDiT_M_2, IMFDiT_XL_2
from .low_rank import LowRank
from .mlp import MLP
from .spectral import spectral_norm_linears
from .tarflow import TarFlow, patchify, unpatchify
from .two_times import two_times

__all__ = [
    "MLP",
    "Affine",
    "DMFDiT",
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
    "LowRank",
    "TarFlow",
    "config_of",
    "create_model",
    "gaussian_average_velocity",
    "patchify",
    "spectral_norm_linears",
    "two_times",
    "unpatchify",
]
