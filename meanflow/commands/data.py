"""`meanflow data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import tyro
from tyro.conf import Positional

from .common import Flag, check_at_least, command, say


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Read every image of a folder as training would, and name those that cannot be read.

    The exit code is 0 if every image can be read, 1 if not.

    Args:
        folder: one sub-folder per class
        image_size: side in pixels that images are scaled to; None: as `meanflow train` scales them
        grey: one grey channel instead of RGB
    """

    folder: Positional[Path]
    image_size: int | None = None
    grey: Flag = False


def data(args: Sequence[str]) -> int:
    """Read every image of a folder: meanflow data check FOLDER"""
    options = tyro.extras.subcommand_cli_from_dict(
        {"check": command(DataCheck)}, args=list(args), prog="meanflow data", description=data.__doc__
    )
    from ..data import ImageFolder
    from ..data.check import check_folder

    size = ImageFolder.image_size
    if options.image_size is not None:
        check_at_least(1, options, "image_size")
        size = options.image_size
    found = check_folder(options.folder.expanduser(), image_size=size, grey=options.grey)
    for line in found.lines():
        say(line)
    return 1 if found.unreadable else 0
