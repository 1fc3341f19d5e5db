"""Checks that several parts share, of arguments first of all; none reads a value of a tensor on a GPU."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from mfkernels import requested_backend
from mfkernels._torch import is_transformed

from .errors import NetworkError, UsageError


def check_floating(name: str, x: Any) -> None:
    """`x` is a tensor of a floating-point dtype."""
    if not isinstance(x, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(x).__name__}")
    if not x.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point dtype, got {x.dtype}")


def can_read(x: Tensor) -> bool:
    """Whether the values of `x` are to be had at once. A GPU would have to be waited for; a compiler, `torch.vmap` and
    fake tensors have none to give."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling() and type(x) is Tensor and not is_transformed(x)


def check_finite(name: str, x: Tensor) -> None:
    """`x` has neither NaN nor infinity, where its values can be read."""
    if x.numel() == 0 or not can_read(x):
        return
    low, high = (float(a) for a in x.detach().aminmax())  # NaN if there is one
    if not -math.inf < low <= high < math.inf:
        raise ValueError(f"{name}: expected finite values, got {high if low > -math.inf else low}")


def check_label_range(y: Tensor, net: Any) -> None:
    """`y` is in the range of labels that `net` says it has, where its values can be read."""
    last = num_classes_of(net)
    if last is not None and y.numel() and can_read(y):
        low, high = (int(a) for a in y.aminmax())
        if low < 0 or high > last:
            raise ValueError(f'y: expected labels in [0, {last}], where {last} is "no label", got {low} to {high}')


def check_labels(y: Any, batch: int, of: str) -> None:
    """`y` is one integer label for each of the `batch` rows of the argument `of`."""
    if not isinstance(y, Tensor):
        raise TypeError(f"y: expected a tensor of labels, got {type(y).__name__}")
    if tuple(y.shape) != (batch,):
        raise ValueError(f"y: expected shape ({batch},), the batch of {of}, got {tuple(y.shape)}")
    if y.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"y: expected integer labels (int32 or int64), got {y.dtype}")


def check_velocity(name: str, u: Any, z: Tensor) -> Tensor:
    """`u`, which a network returned at `z`, if it is a tensor of the shape of z."""
    if not isinstance(u, Tensor):
        raise NetworkError(f"net: expected it to return {name}, a tensor of the shape of z, got {type(u).__name__}")
    if u.shape != z.shape:
        raise NetworkError(f"net: expected {name} of the shape of z, {tuple(z.shape)}, got {tuple(u.shape)}")
    return u


def check_takes(net: Callable[..., Any], *keywords: str) -> None:
    """`net` can be called as net(z, r, t, keyword=…). A compiler takes it as it is."""
    if torch.compiler.is_compiling():
        return
    try:
        # what a decorator wraps may take other arguments than the decorated function
        signature = inspect.signature(getattr(net, "forward", net), follow_wrapped=False)
    except (TypeError, ValueError):  # of code that is not Python
        return
    try:
        signature.bind("z", "r", "t", **dict.fromkeys(keywords))
    except TypeError as error:
        wanted = ", ".join(["z, r, t, y", *(f"{keyword}=" for keyword in keywords if keyword != "y")])
        raise NetworkError(f"net: expected net({wanted}), got {type(net).__name__}{signature}: {error}") from error


def num_classes_of(net: Any) -> int | None:
    """The index that means "no label" for `net`, None if it names none; looks inside wrappers such as DDP."""
    while net is not None:
        n = getattr(net, "num_classes", None)
        if isinstance(n, int):
            return n
        net = getattr(net, "module", None)
    return None


def no_label_of(net: Any) -> int:
    """The index that means "no label" for `net`; looks inside wrappers such as DDP.

    Raises:
        NetworkError: neither `net` nor a module it wraps has the attribute `num_classes`.
    """
    n = num_classes_of(net)
    if n is not None:
        return n
    raise NetworkError(
        'net: expected an attribute num_classes (the index that means "no label") because labels are dropped or the '
        f"target is guided; {type(net).__name__} has none. Set it, or use label_dropout=0, omega=1, kappa=0"
    )


def check_backend() -> None:
    """Raise where MFKERNELS_BACKEND names no backend."""
    try:
        requested_backend()
    except ValueError as error:
        raise UsageError(str(error)) from error


def check_device(name: str) -> None:
    """Raise where a GPU is asked for and there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UsageError(
            "cuda was asked for, but PyTorch sees no GPU here (`meanflow info` shows what it sees)", field="device"
        )
