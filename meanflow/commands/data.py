"""`meanflow data`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, TypedDict

import tyro
from tyro.conf import Positional

from ..options import options_of
from ..registry import DATA_PREFIXES, find
from .common import WITHOUT_PREFIX, Flag, command, say


@dataclasses.dataclass(frozen=True)
class DataCheck:
    """Read every image of a data set as training would, and name those that cannot be read.

    The exit code is 0 if every image can be read, 1 if not. `meanflow data check wds:PATTERN --help` shows the options
    that say where its labels are, and so does hf:NAME.

    Args:
        data: a folder with one sub-folder per class, wds:PATTERN or hf:NAME_OR_PATH
        image_size: side in pixels that images are scaled to; None: as `meanflow train` scales them
        grey: one grey channel instead of RGB
    """

    data: Positional[str]
    image_size: int | None = None
    grey: Flag = False


def _own_flags(args: Sequence[str]) -> Any:
    """The flags of the kind of data set that is named, where it is no folder."""
    kinds: dict[str, Any] = {}
    for prefix in {arg.partition(":")[0] for arg in args if ":" in arg} & set(DATA_PREFIXES):
        from ..data import EncodedSource  # imports PyTorch

        shared = {option.name for option in options_of(EncodedSource)}
        for option in options_of(find("data", prefix)):
            if option.name not in shared and option.flag is not False:
                help = f"{option.help} (default: {option.default or 'none'})"
                kinds[option.name] = Annotated[option.kind, tyro.conf.arg(help=help, help_behavior_hint="")]
    flags: Any = TypedDict("own", kinds, total=False)  # type: ignore[misc]
    return WITHOUT_PREFIX[flags]


def data(args: Sequence[str]) -> int:
    """Read every image of a data set: meanflow data check FOLDER"""
    options = tyro.extras.subcommand_cli_from_dict(
        {"check": command(DataCheck, ("own", _own_flags(args)))},
        args=list(args),
        prog="meanflow data",
        description=data.__doc__,
    )
    from ..config import Config
    from ..data.check import check_images

    prefixed = options.data.partition(":")[0] in DATA_PREFIXES and ":" in options.data
    place = {"data": options.data} if prefixed else {"data": "folder", "folder": options.data}
    size = {} if options.image_size is None else {"image_size": options.image_size}
    source: Any = Config.of(**place, **size, grey=options.grey, **options.own).data
    found = check_images(source.find(), image_size=source.image_size, grey=source.grey)
    for line in found.lines():
        say(line)
    return 1 if found.unreadable else 0
