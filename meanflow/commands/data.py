"""`meanflow data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from tyro.conf import Positional

from ..errors import UsageError
from ..registry import DATA_PREFIXES
from .common import Flag, command, reading_flags, say


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Read every image of a data set as training would, and name those that cannot be read.

    Every file of a folder of latents is compared with its checksum. The exit code is 0 if nothing is wrong, 1 if not.
    `meanflow data check wds:PATTERN --help` shows the options that say where its labels are, and so does hf:NAME.

    Args:
        data: a folder with one sub-folder per class, wds:PATTERN, hf:NAME_OR_PATH, or a folder of latents
        image_size: side in pixels that images are scaled to; None: as `meanflow train` scales them
        grey: one grey channel instead of RGB
    """

    data: Positional[str]
    image_size: int | None = None
    grey: Flag = False


def data(args: Sequence[str]) -> int:
    """Read every image of a data set: meanflow data check FOLDER"""
    options = tyro.extras.subcommand_cli_from_dict(
        {"check": command(DataCheck, ("reading", reading_flags(args)))},
        args=list(args),
        prog="meanflow data",
        description=data.__doc__,
    )
    from ..config import Config
    from ..data import is_latents
    from ..data.check import check_images, check_latents

    if is_latents(options.data):
        for name in ("image_size", "grey"):
            if getattr(options, name):
                raise UsageError("expected only with images, got latents", field=name)
        checked = check_latents(Path(options.data).expanduser())
        for line in checked.lines():
            say(line)
        return 1 if checked.damaged else 0
    prefixed = options.data.partition(":")[0] in DATA_PREFIXES and ":" in options.data
    place = {"data": options.data} if prefixed else {"data": "folder", "folder": options.data}
    size = {} if options.image_size is None else {"image_size": options.image_size}
    source: Any = Config.of(**place, **size, grey=options.grey, **options.reading).data
    found = check_images(source.find(), image_size=source.image_size, grey=source.grey)
    for line in found.lines():
        say(line)
    return 1 if found.unreadable else 0
