"""Named configurations for `meanflow train NAME`, one file per data set or paper: functions that return a `Config`."""

from __future__ import annotations

from ..config import Config
from ..registry import find, names, register
from . import (
    digits,
    digits_family,
    easy_consistency,
    improved_meanflow,
    meanflow,
    points,
    scm,
    shortcut,
    sit,
    tarflow,
)
from .published import Published, PublishedRecipe, published

__all__ = [
    "Published",
    "PublishedRecipe",
    "digits",
    "digits_family",
    "easy_consistency",
    "improved_meanflow",
    "meanflow",
    "points",
    "published",
    "recipe",
    "register",
    "scm",
    "shortcut",
    "sit",
    "tarflow",
    "variant",
]


def recipe(name: str) -> Config:
    """The configuration of that name.

    Raises:
        UsageError: there is none.
    """
    config: Config = find("recipes", name)()
    return config


def variant(name: str, objective: str | None = None) -> str:
    """The name itself, or that of its variant for an objective that has one: "digits" with "imf" is "digits-imf"."""
    other = f"{name}-{objective}"
    return other if other in names("recipes") else name
