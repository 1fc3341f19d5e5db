"""`meanflow sample`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tyro.conf import Positional

from ..checks import check_backend
from ..errors import UsageError
from ..files import replaced
from ..training.network import load_network
from ..training.pictures import POINTS, makes_picture, samples_picture, save_picture
from .common import (
    Device,
    Flag,
    check_at_least,
    check_out,
    check_sampling,
    device_of,
    parse,
    say,
    source_of,
    with_sampling,
)


@dataclasses.dataclass(frozen=True)
class Sample:
    """Draw images from a trained network.

    Args:
        run: a run folder or its name, a checkpoint folder, or a weight file of `meanflow convert`
        labels: labels or class names, separated by commas; empty: every class, at most ten
        count: images per label; of 2-D points 500 where nobody says how many
        seed: of the noise
        out: where to: a picture, or an array (n, C, H, W) with the suffix .npy
        weights: ema: averaged weights; raw: those of the last step; one of the run's --ema-decays; or power:LENGTH, of
            a run with --power-ema
        codec: where its autoencoder is now, of a run on latents; None: where it was
        trust_code: run the function "package.module:function" that the run names as its model
        device: auto: a GPU if there is one
    """

    run: Positional[str]
    labels: str = ""
    count: int | None = None
    seed: int = 0
    out: Path = Path("grid.png")
    weights: str = "ema"
    codec: str | None = None
    trust_code: Flag = False
    device: Device = "auto"


def sample(args: Sequence[str]) -> int:
    """Draw images from a trained network"""
    options = parse(with_sampling(Sample, args), args, prog="sample")
    if options.count is not None:
        check_at_least(1, options, "count")
    check_out(options.out)
    check_backend()
    device = device_of(options.device)
    loaded = load_network(source_of(options.run), options.weights, device, trust_code=options.trust_code)
    if options.codec is not None:
        loaded = loaded.with_autoencoder(options.codec)
    sampling = check_sampling(options.sampling, loaded)
    labels = labels_of(options.labels, loaded.class_names)
    if options.out.suffix != ".npy" and not makes_picture(loaded.image_shape):
        raise UsageError(
            f"{loaded.image_shape[0]} channels make no picture; write an array instead, with --out "
            f"{options.out.stem}.npy",
            field="out",
        )
    count = options.count or (500 if loaded.image_shape == POINTS else 10)
    every = torch.tensor(labels).repeat_interleave(count)
    images = loaded.generate(every, seed=options.seed, device=device, **sampling)  # [labels·count, C, H, W]
    if options.out.suffix == ".npy":
        with replaced(options.out) as partial:
            np.save(partial, images.numpy())
    else:
        try:
            picture = samples_picture(images, count, every, loaded.class_names)
            save_picture(picture, options.out)
        except (OSError, ValueError) as error:
            raise UsageError(f"cannot write {options.out}: {error}", field="out") from error
    say(f"{len(images)} images from {loaded.source}: {options.out}")
    return 0


def labels_of(text: str, names: Sequence[str]) -> list[int]:
    """Labels by number or by class name, with commas between; "" for the first ten.

    Raises:
        UsageError: there is no such class.
    """
    if not text:
        return list(range(min(10, len(names))))
    by_number = not any(name.isdecimal() for name in names)  # else "3" could be either
    labels = []
    for word in text.split(","):
        word = word.strip()
        if word in names:
            labels.append(names.index(word))
        elif by_number and word.isdecimal() and int(word) < len(names):
            labels.append(int(word))
        else:
            shown = ", ".join(names[:10]) + (" …" if len(names) > 10 else "")
            numbers = f" or numbers below {len(names)}" if by_number else ""
            raise UsageError(f"expected class names{numbers} ({shown}), got {word!r}", field="labels")
    return labels
