"""`meanflow info`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from ..checks import check_backend
from ..diagnosis import describe
from .common import Device, command, device_of, parse


@dataclasses.dataclass(frozen=True)
class Info:
    """Print versions, devices, and which backend serves each operation on each device.

    Args:
        device: auto: every device there is
    """

    device: Device = "auto"


def info(args: Sequence[str]) -> int:
    """Versions, devices, and which backend serves which operation"""
    options = parse(command(Info), args, prog="info")
    check_backend()
    print(describe(None if options.device == "auto" else device_of(options.device)))
    return 0
