"""`meanflow convert`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from tyro.conf import Positional

from ..errors import UsageError
from ..weight_files import convert_file
from .common import Flag, command, parse, say


@dataclasses.dataclass(frozen=True)
class Convert:
    """Turn other programs' weights into a safetensors file for `meanflow sample` and `meanflow train --init`.

    Reads the MeanFlow and improved MeanFlow authors' JAX weights as .npz of '/'-joined names, and PyTorch weights (.pt,
    .pth, .safetensors) of the improved MeanFlow authors, DiT and SiT. A SiT, with --reversed-time, is a flow that can
    teach and be distilled (`meanflow train --teacher FILE --init FILE`); a DiT, which predicts noise, is a start for
    training.

    Args:
        weights: .npz, .pt, .pth or .safetensors
        out: the safetensors file to write
        num_heads: attention heads; None: 16 at width 1152, else width / 64
        input_size: side of the image or latent; None: from the positions, else 32
        reversed_time: the weights are of a velocity whose time runs from noise at 0 to data at 1, as SiT's: rewrite
            them for the time here, exactly
        overwrite: replace the file if it exists
    """

    weights: Positional[Path]
    out: Path
    num_heads: int | None = None
    input_size: int | None = None
    reversed_time: Flag = False
    overwrite: Flag = False


def convert(args: Sequence[str]) -> int:
    """Weights of other programs as a safetensors file"""
    options = parse(command(Convert), args, prog="convert")
    if options.out.is_dir():
        raise UsageError(f"expected a file, got the folder {options.out}", field="out")
    if options.out.exists() and not options.overwrite:
        raise UsageError(f"{options.out} exists already; choose another name or add --overwrite", field="out")
    sizes = {"num_heads": options.num_heads, "input_size": options.input_size}
    say(convert_file(options.weights, options.out, reversed_time=options.reversed_time, **sizes))
    return 0
