"""`meanflow encode`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from .common import Device, Flag, check_at_least, command, parse, reading_flags, say


@dataclasses.dataclass(frozen=True)
class Encode:
    """Make latents of images by a pretrained autoencoder, for `meanflow train --data LATENTS`.

    The mean and the standard deviation of each latent are stored, and sampled anew at each training step. Under
    torchrun the processes share the images. What was stopped goes on where it was with the same command.

    Args:
        images: a folder with one sub-folder per class, wds:PATTERN or hf:NAME_OR_PATH
        codec: a repository of an AutoencoderKL on the Hugging Face hub, or a folder with one
        out: folder of the latents
        image_size: side in pixels: images are scaled to it on their shorter side and cut to the centre
        subfolder: of the repository, such as vae of a whole pipeline
        revision: of the repository: a branch, a tag or a commit; None: its newest
        mirrored: encode the mirrored images too, which training with --flip takes for half of them
        dtype: of the files; float16 takes half the space, with three digits
        precision: of the encoder's products; tf32 and bf16 are less exact, for GPUs that have them
        skip_unreadable: an image that cannot be read: another one of its class in its place
        shard_size: images of a file
        batch_size: images that are encoded at a time; of more than 16 the autoencoder takes 16 at a time
        workers: processes that decode images, of each process
        device: auto: a GPU if there is one
    """

    images: Positional[str]
    codec: str = "stabilityai/sd-vae-ft-mse"
    out: Path = Path("latents")
    image_size: int = 256
    subfolder: str = ""
    revision: str | None = None
    mirrored: Flag = True
    dtype: Literal["float32", "float16"] = "float32"
    precision: Literal["float32", "tf32", "bf16"] = "float32"
    skip_unreadable: Flag = False
    shard_size: int = 1024
    batch_size: int = 16
    workers: int = 2
    device: Device = "auto"


def encode(args: Sequence[str]) -> int:
    """Latents of a folder of images, by a pretrained autoencoder"""
    options = parse(command(Encode, ("reading", reading_flags(args))), args, prog="encode")
    check_at_least(1, options, "image_size", "shard_size", "batch_size")
    check_at_least(0, options, "workers")
    import torch
    from accelerate import PartialState
    from accelerate.utils import gather_object

    from ..checks import check_device
    from ..codecs import Autoencoder, absolute_if_there
    from ..config import Config
    from ..encoding import encode_images

    check_device(options.device)
    state = PartialState(cpu=options.device == "cpu" or not torch.accelerator.is_available())
    folder = Path(options.images).expanduser()
    images = str(folder.resolve()) if folder.is_dir() else options.images
    given = {"data": images, "image_size": options.image_size, "skip_unreadable": options.skip_unreadable}
    source = Config.of(**given, **options.reading).data
    where = {"revision": options.revision, "subfolder": options.subfolder}
    codec = Autoencoder(pretrained=absolute_if_there(options.codec), **where).identified()
    data = source.load()
    if data.left_out is not None:
        data.left_out.name_new()
    done = encode_images(
        data,
        codec,
        options.out,
        mirrored=options.mirrored,
        dtype=options.dtype,
        precision=options.precision,
        shard_size=options.shard_size,
        batch_size=options.batch_size,
        workers=options.workers,
        device=state.device,
    )
    for line in done.lines():
        say(line)
    if data.left_out is not None:
        data.left_out.add_named(gather_object(list(data.left_out.reasons.items())))  # each process has met its own
        if data.left_out.reasons:
            say(data.left_out.summary())
    say(f"Train on them: meanflow train DiT-B/4 --data {options.out}")
    return 0
