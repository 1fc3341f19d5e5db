"""What a launcher (torchrun, accelerate launch) says in the environment of the processes that it starts."""

from __future__ import annotations

import os

from .errors import UsageError


def world_size() -> int:
    """Number of processes that the launcher started; 1 without one.

    Raises:
        UsageError: WORLD_SIZE is no such number, or it says several and which of them this is stands nowhere.
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
    """Whether this process speaks for all: the first of several, or the only one."""
    return os.environ.get("RANK", "0") in ("0", "") or os.environ.get("WORLD_SIZE", "1") in ("1", "")
