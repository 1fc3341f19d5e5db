"""Encoded images, in files or in parts of files, decoded when they are asked for. Transparent ones are put on white."""

from __future__ import annotations

import errno
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError
from .images import ImageData, ImageSource, TensorImages, stratified_split, to_unit_range
from .left_out import LeftOut, UnreadableImage

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow goes by a file's content: a PostScript file of any name would start Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CACHE_BYTES = 2**30
BITS_PER_SAMPLE = 258  # TIFF's tag


class EncodedImage(ABC):
    """An image in a part of a file; `str` of it is its name in messages."""

    @abstractmethod
    def read(self) -> bytes:
        """Its bytes, as those of a file of its own.

        Raises:
            OSError: they cannot be read.
        """

    @abstractmethod
    def __str__(self) -> str: ...


class EncodedImages(Protocol):
    """Files or parts of files, by their numbers from 0. Those of a million images have to fit into memory."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Path | EncodedImage: ...


@dataclass(frozen=True)
class FoundImages:
    """A data set of which nothing is decoded yet.

    name: of the data set, in messages.
    labels: (n,) int64.
    skipped: files of it that are no images of a class.
    """

    name: str
    images: EncodedImages
    labels: Tensor
    class_names: tuple[str, ...]
    skipped: int = 0


def read_image(source: Path | EncodedImage, size: int, *, grey: bool) -> Tensor:
    """Decode, put on white, turn as its EXIF says, scale the shorter side to `size` and cut out the centre.

    Returns:
        (1 or 3, size, size) uint8.

    Raises:
        UnreadableImage: the file is no image that Pillow can read, or a PNG, TIFF or PPM of more than 8 bits a channel.
        UsageError: the machine cannot open more files.
    """
    try:
        with Image.open(source if isinstance(source, Path) else BytesIO(source.read()), formats=FORMATS) as image:
            if _is_deep(image):
                raise UnreadableImage(source, "it has more than 8 bits a channel; convert it to 8 bits")
            picture = _on_white(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
            picture = ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(source, "it is no image of a known format") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # no fault of the file
            raise UsageError(f"data: cannot open {source}: {error.strerror}") from error
        raise UnreadableImage(source, error.strerror or str(error)) from error
    except Exception as error:  # a damaged file raises what its decoder happens to run into
        raise UnreadableImage(source, str(error) or type(error).__name__) from error
    pixels = np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)  # [H, W, C]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _is_deep(image: ImageFile.ImageFile) -> bool:
    """Whether an image that is not decoded yet has more than 8 bits a channel: of colours Pillow keeps the upper 8."""
    if image.mode.startswith(("I", "F")):
        return True
    if any(bits > 8 for bits in getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, ())):
        return True
    for tile in image.tile:  # what Pillow's decoders are told: 'zip', …, 'RGB;16B' of a PNG; 'ppm', …, ('RGB', 65535)
        decoder, arguments = tile[0], tile[3]
        words = arguments if isinstance(arguments, tuple) else (arguments,)
        if decoder in ("ppm", "ppm_plain") and words[1] > 255:
            return True
        if re.search(r";16[BLN]", str(words[0])):
            return True
    return False


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


class DecodedImages:
    """Images decoded when they are asked for.

    With `left_out`, an image that cannot be read is recorded there, and the next one of its class that can be read
    (after the last one the first) is given in its place. That depends on the files alone, so every process and every
    resumed run sees the same, and the number and the labels of the images stay as they are.

    Args:
        found: a data set.
        indices: (n,) int64, which images of it.
        left_out: record of what is left out; None: an image that cannot be read is an error.
    """

    def __init__(
        self, found: FoundImages, indices: Tensor, *, size: int, grey: bool, left_out: LeftOut | None = None
    ) -> None:
        self._encoded, self._indices, self.labels = found.images, indices, found.labels[indices]
        self.size, self.grey, self.left_out = size, grey, left_out
        self._stand_ins: dict[int, int] = {}  # for images that could not be read

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """
        Raises:
            UsageError: the image cannot be read, or none of its class can.
        """
        return to_unit_range(self._or_stand_in(index, self._try(index))), int(self.labels[index])

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) float32, all or those of `indices`."""
        return to_unit_range(self.pixels(indices))

    def pixels(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) uint8, decoded by several threads; a bar shows how far it is."""
        chosen = range(len(self)) if indices is None else indices
        pool = ThreadPoolExecutor()
        try:
            decoded = pool.map(self._try, chosen)
            bar = tqdm(decoded, total=len(chosen), desc="reading images", leave=False, disable=None)
            return torch.stack([self._or_stand_in(i, found) for i, found in zip(chosen, bar, strict=True)])
        finally:
            pool.shutdown(cancel_futures=True)  # after an error, the images that were not read yet

    def _try(self, index: int) -> Tensor | UnreadableImage:
        """The pixels of an image or of what is known to stand in for it."""
        try:
            encoded = self._encoded[int(self._indices[self._stand_ins.get(index, index)])]
            return read_image(encoded, self.size, grey=self.grey)
        except UnreadableImage as error:
            return error

    def _or_stand_in(self, index: int, found: Tensor | UnreadableImage) -> Tensor:
        """What was found for `index`, or else the next image of its class."""
        if isinstance(found, Tensor):
            return found
        if self.left_out is None:
            raise UsageError(
                f"{found}. `meanflow data check FOLDER` (or wds:PATTERN, hf:NAME) names every such image; "
                "--skip-unreadable leaves them out"
            )
        self.left_out.add(found.path, found.reason)
        members = (self.labels == self.labels[index]).nonzero().flatten().tolist()
        later = [i for i in members if i > index]
        for other in later + members[: len(members) - len(later) - 1]:
            if other in self._stand_ins:
                continue
            candidate = self._try(other)
            if isinstance(candidate, Tensor):
                self._stand_ins[index] = other
                return candidate
            self.left_out.add(candidate.path, candidate.reason)
        raise UsageError(f"data: none of the {len(members)} images of the class of {found.path} can be read")


def load_images(
    found: FoundImages, *, image_size: int, grey: bool = False, held_out: float = 0.0, skip_unreadable: bool = False
) -> ImageData:
    """A data set's images, a share of each class held out.

    Up to 1 GiB of pixels is decoded once, here, and kept in memory; more is decoded as training goes.

    Args:
        skip_unreadable: leave images out that cannot be read (`ImageData.left_out` has them). In either case another
            one takes the place (see `DecodedImages`), rather than that one fewer is trained on: the split and the order
            of the samples are the same whatever cannot be read, and whether the images are in memory or not. The
            place of a held-out image is taken by a held-out one.

    Raises:
        UsageError: an image cannot be used, or no image of a class; the message names it.
    """
    channels = 1 if grey else 3
    in_memory = len(found.labels) * channels * image_size**2 <= CACHE_BYTES
    left_out = LeftOut() if skip_unreadable else None

    def part(indices: Tensor) -> ImageSource:
        source = DecodedImages(found, indices, size=image_size, grey=grey, left_out=left_out)
        return TensorImages(source.pixels(), source.labels) if in_memory and len(indices) else source

    train, kept = stratified_split(found.labels, held_out)
    return ImageData(
        name=found.name,
        train=part(train),
        held_out=part(kept) if len(kept) else None,
        class_names=found.class_names,
        channels=channels,
        image_size=image_size,
        skipped=found.skipped,
        left_out=left_out,
    )
