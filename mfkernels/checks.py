"""Argument checks shared by the public functions: messages name the argument, what was expected and what came."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from .dual import Dual, check_tangent, primal_of
from .forward_mode import refuse_tangent

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def check_operand(name: str, x: Any, ndim: int | tuple[int, ...] | None = None) -> None:
    """`x` is a floating-point tensor, or a Dual whose tangent fits its primal, of the expected rank."""
    p = x.primal if isinstance(x, Dual) else x
    if not isinstance(p, Tensor):
        raise TypeError(f"{name}: expected a tensor or a Dual, got {type(x).__name__}")
    if p.layout is not torch.strided or p.is_nested:
        kind = "a nested tensor" if p.is_nested else f"layout {p.layout}"
        raise TypeError(f"{name}: expected a dense (strided) tensor, got {kind}")
    if p.dtype not in DTYPES:
        want = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise TypeError(f"{name}: expected a floating-point dtype ({want}), got {p.dtype}")
    if ndim is not None:
        allowed = (ndim,) if isinstance(ndim, int) else ndim
        if p.ndim not in allowed:
            want = " or ".join(map(str, allowed))
            raise ValueError(f"{name}: expected {want} dimensions, got shape {tuple(p.shape)}")
    if isinstance(x, Dual) and x.tangent is not None:
        check_tangent(f"{name}.tangent", p, x.tangent)


def autocast_enabled(device: torch.device) -> bool:
    """Whether autocast is on for `device`; "meta" has none."""
    # not torch.amp.is_autocast_available, which breaks a compiled graph before torch 2.12
    return device.type != "meta" and torch.is_autocast_enabled(device.type)


def autocast_dtype(dtype: torch.dtype, device: torch.device) -> torch.dtype:
    """Autocast's dtype where it is on, else `dtype`; float64 stays as it is."""
    if dtype != torch.float64 and autocast_enabled(device):
        return torch.get_autocast_dtype(device.type)
    return dtype


def check_rows(name: str, x: Any) -> None:
    """`x` is an operand (B, …, D): a batch and a last dimension at least."""
    check_operand(name, x)
    if primal_of(x).ndim < 2:
        raise ValueError(f"{name}: expected (B, …, D), got shape {tuple(x.shape)}")


def check_shape(name: str, x: Any, shape: tuple[int, ...], meaning: str) -> None:
    """`x` has exactly `shape`, described by `meaning` (for example "(B, D) of x")."""
    if tuple(x.shape) != tuple(shape):
        raise ValueError(f"{name}: expected shape {meaning} = {tuple(shape)}, got {tuple(x.shape)}")


def check_same(name: str, x: Any, like_name: str, like: Any) -> None:
    """`x` has the device of `like` and, outside autocast (which mixes dtypes by design), its dtype."""
    if x.dtype != like.dtype and not autocast_enabled(like.device):
        raise TypeError(f"{name}: expected the dtype of {like_name}, {like.dtype}, got {x.dtype}")
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of {like_name}, {like.device}, got {x.device}")


def check_parameter(name: str, x: Any, ndim: int, like: Any) -> None:
    """`x` is a plain tensor of `ndim` dimensions that fits the argument x, `like`, in dtype and device."""
    if isinstance(x, Dual):
        raise TypeError(f"{name}: expected a tensor, got a Dual: it is the same for every sample and has no tangent")
    check_operand(name, x, ndim)
    check_same(name, x, "x", like)


def check_number(name: str, value: Any, low: float = -math.inf, *, above: bool = False) -> float:
    """`value` as a float, if it is a number, finite and at least `low`; with `above`, greater than it."""
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):  # torch.compile traces the first two
        raise TypeError(f"{name}: expected a number, got {type(value).__name__}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not (low < number if above else low <= number) or not abs(number) < math.inf:  # NaN fails too
        want = "" if low == -math.inf else f" {'>' if above else '>='} {low:g}"
        raise ValueError(f"{name}: expected a finite number{want}, got {value}")
    return number


def check_flag(name: str, value: Any) -> None:
    """`value` is a bool: the truth value of other types ("no", a tensor) may not be what the caller meant."""
    if not isinstance(value, bool):
        raise TypeError(f"{name}: expected True or False, got {type(value).__name__}")


def check_constant(name: str, x: Any, shape: tuple[int, ...], meaning: str, like: Any) -> None:
    """`x` is a plain tensor of `shape` on the device of `like`, in any float dtype, that carries no tangent.

    That is: a parameter or a table, which does not depend on the sample or on time.
    """
    if isinstance(x, Dual):
        raise TypeError(f"{name}: expected a tensor, got a Dual: it is the same for every sample and has no tangent")
    check_operand(name, x)
    check_shape(name, x, shape, meaning)
    if x.device != like.device:
        raise ValueError(f"{name}: expected the device of the input, {like.device}, got {x.device}")
    refuse_tangent(name, x, "parameter or table")
