"""The environment variables that a launcher (torchrun, accelerate launch) sets for its processes."""

from __future__ import annotations

import os

from .errors import UsageError


def world_size() -> int:
    """Number of processes that the launcher started; 1 without one.

    Raises:
        UsageError: WORLD_SIZE is no such number, or it is several and RANK or LOCAL_RANK is not set.
    """
    words = os.environ.get("WORLD_SIZE", "1")
    if not words.isdecimal() or int(words) < 1:
        raise UsageError(f"WORLD_SIZE: expected a number of processes, got {words!r}")
    missing = [name for name in ("RANK", "LOCAL_RANK") if not os.environ.get(name, "").isdecimal()]
    if int(words) > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE: {words} processes are announced, but {' and '.join(missing)} of this one is not; start them "
            "with torchrun, or take WORLD_SIZE out of the environment"
        )
    return int(words)


def is_first() -> bool:
    """Whether this process prints for all: the first of several, or the only one."""
    return os.environ.get("RANK", "0") in ("0", "") or os.environ.get("WORLD_SIZE", "1") in ("1", "")
