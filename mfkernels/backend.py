"""Which backend serves which call.

In this order: what the caller asked for (`use_backend`, or the environment variable MFKERNELS_BACKEND); on CUDA tensors
the fastest backend that supports the call; else `reference`, plain PyTorch. A request that a backend cannot serve is an
error that says what is supported, never a silent detour.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch

BACKENDS = ("reference", "triton", "cuda")

# Answers for one call: None when the backend can serve it, else why it cannot ("head dim 7: expected …").
Support = Callable[[], str | None]

# A plain global, not a context variable: autograd runs backward on threads of its own, and Dynamo guards on globals.
_requested: str | None = os.environ.get("MFKERNELS_BACKEND") or None


def _checked(name: str | None, source: str) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"{source}: expected one of {', '.join(BACKENDS)}, got {name!r}")
    return name


@contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Serve every call of the block (in all threads) by one backend.

    Args:
        name: "reference", "triton" or "cuda"; None restores the automatic choice.

    Raises:
        ValueError: the name is unknown. Inside the block: `NotImplementedError` by ops that this backend does not have.
    """
    global _requested
    before = _requested
    _requested = _checked(name, "name")
    try:
        yield
    finally:
        _requested = before


def requested_backend() -> str | None:
    """The backend that the caller asked for, or None for the automatic choice."""
    return _checked(_requested, "MFKERNELS_BACKEND")


def choose(op: str, device: torch.device, supports: Mapping[str, Support]) -> str:
    """The backend that serves this call of `op`.

    Args:
        op: the op's name, for messages.
        device: where the op's tensors are.
        supports: the op's backends other than "reference", fastest first, each with its answer for this call.

    Raises:
        NotImplementedError: the requested backend does not serve this call.
    """
    asked = requested_backend()
    if asked == "reference":
        return asked
    if asked is not None:
        if asked not in supports:
            has = ", ".join(["reference", *supports])
            raise NotImplementedError(
                f"{op}: no {asked} backend (it has: {has}), which use_backend or MFKERNELS_BACKEND asked for"
            )
        why_not = supports[asked]()
        if why_not is not None:
            raise NotImplementedError(f"{op}: the {asked} backend cannot serve this call: {why_not}")
        return asked
    if device.type == "cuda":
        for name, why in supports.items():
            if why() is None:
                return name
    return "reference"
