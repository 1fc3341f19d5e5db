"""A folder of images: one sub-folder per class. Transparent images are put on white."""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError
from .images import ImageData, ImageSource, TensorImages, stratified_split, to_unit_range
from .left_out import LeftOut, UnreadableImage

PARTS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")  # of other people's data sets
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Pillow goes by a file's content: a PostScript file of any name would start Ghostscript
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
CACHE_BYTES = 2**30
BITS_PER_SAMPLE = 258  # TIFF's tag


def read_image(path: Path, size: int, *, grey: bool) -> Tensor:
    """Decode, put on white, turn as its EXIF says, scale the shorter side to `size` and cut out the centre.

    Returns:
        (1 or 3, size, size) uint8.

    Raises:
        UnreadableImage: the file is no image that Pillow can read, or a PNG, TIFF or PPM of more than 8 bits a channel.
        UsageError: the machine cannot open more files.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            if _is_deep(image):
                raise UnreadableImage(path, "it has more than 8 bits a channel; convert it to 8 bits")
            picture = _on_white(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
            picture = ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC)
    except (UnreadableImage, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise UnreadableImage(path, "it is no image of a known format") from error
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOMEM):  # no fault of the file
            raise UsageError(f"data: cannot open {path}: {error.strerror}") from error
        raise UnreadableImage(path, error.strerror or str(error)) from error
    except Exception as error:  # a damaged file raises what its decoder happens to run into
        raise UnreadableImage(path, str(error) or type(error).__name__) from error
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


class FolderImages:
    """Images decoded when they are asked for.

    With `left_out`, an image that cannot be read is recorded there, and the next one of its class that can be read
    (after the last one the first) is given in its place. That depends on the files alone, so every process and every
    resumed run sees the same, and the number and the labels of the images stay as they are.

    Args:
        paths: one per image.
        labels: (n,) int64.
        left_out: record of what is left out; None: an image that cannot be read is an error.
    """

    def __init__(
        self, paths: Sequence[Path], labels: Tensor, *, size: int, grey: bool, left_out: LeftOut | None = None
    ) -> None:
        self.paths, self.labels, self.size, self.grey, self.left_out = list(paths), labels, size, grey, left_out
        self._stand_ins: dict[int, int] = {}  # for images that could not be read

    def __len__(self) -> int:
        return len(self.paths)

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
            return read_image(self.paths[self._stand_ins.get(index, index)], self.size, grey=self.grey)
        except UnreadableImage as error:
            return error

    def _or_stand_in(self, index: int, found: Tensor | UnreadableImage) -> Tensor:
        """What was found for `index`, or else the next image of its class."""
        if isinstance(found, Tensor):
            return found
        if self.left_out is None:
            raise UsageError(
                f"{found}. `meanflow data check FOLDER` names every such file; --skip-unreadable leaves them out"
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


def find_images(folder: Path) -> tuple[list[Path], Tensor, tuple[str, ...], int]:
    """Image files of a folder with one sub-folder per class, in sorted order; labels number the sorted sub-folders.

    Files and folders whose names begin with a dot are not looked at.

    Returns:
        paths, labels (n,), class names, number of other files.

    Raises:
        UsageError: the folder is missing, has no sub-folders, or a sub-folder has no images; or the sub-folders are
            parts of the data, each with a folder per class.
    """
    if not folder.is_dir():
        raise UsageError(f"data: no folder {folder}{' (it is a file)' if folder.exists() else ''}")
    classes = sorted(entry for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    expected = f"expected {folder}/CLASS/IMAGE, one sub-folder per class"
    if not classes:
        here = sum(entry.suffix.lower() in SUFFIXES for entry in folder.iterdir())
        found = f"{here} images and no sub-folders" if here else "no sub-folders"
        raise UsageError(f"data: {expected}, found {found}. To train without classes, put all images in one sub-folder")
    _refuse_parts(classes)
    paths: list[Path] = []
    labels: list[int] = []
    others = sum(entry.is_file() and not entry.name.startswith(".") for entry in folder.iterdir())
    for label, entry in enumerate(classes):
        files = [p for p in entry.rglob("*") if not _hidden(p.relative_to(entry)) and p.is_file()]
        images = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
        if not images:
            raise UsageError(f"data: no images in {entry} ({expected}; image files end in {', '.join(SUFFIXES)})")
        paths += images
        labels += [label] * len(images)
        others += len(files) - len(images)
    return paths, torch.tensor(labels), tuple(entry.name for entry in classes), others


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _refuse_parts(classes: Sequence[Path]) -> None:
    """FOLDER/train/CLASS and FOLDER/val/CLASS would train on the classes "train" and "val"."""
    if all(entry.name.lower() in PARTS for entry in classes) and not any(_has_images(entry) for entry in classes):
        raise UsageError(
            f"data: {' and '.join(entry.name for entry in classes)} in {classes[0].parent} are parts of a data set; "
            f"expected one sub-folder per class, such as in {classes[0]}"
        )


def _has_images(folder: Path) -> bool:
    return any(item.suffix.lower() in SUFFIXES and not item.name.startswith(".") for item in folder.iterdir())


def load_folder(
    folder: Path, *, image_size: int, grey: bool = False, held_out: float = 0.0, skip_unreadable: bool = False
) -> ImageData:
    """The images of a folder, a share of each class held out.

    Up to 1 GiB of pixels is decoded once, here, and kept in memory; more is decoded as training goes.

    Args:
        skip_unreadable: leave images out that cannot be read (`ImageData.left_out` has them). In either case another
            one takes the place (see `FolderImages`), rather than that one fewer is trained on: the split and the order
            of the samples are the same whatever cannot be read, and whether the images are in memory or not. The
            place of a held-out image is taken by a held-out one.

    Raises:
        UsageError: the folder or an image in it cannot be used, or no image of a class; the message names it.
    """
    paths, labels, class_names, skipped = find_images(folder)
    channels = 1 if grey else 3
    in_memory = len(paths) * channels * image_size**2 <= CACHE_BYTES
    left_out = LeftOut() if skip_unreadable else None

    def part(indices: Tensor) -> ImageSource:
        chosen = [paths[i] for i in indices.tolist()]
        source = FolderImages(chosen, labels[indices], size=image_size, grey=grey, left_out=left_out)
        return TensorImages(source.pixels(), source.labels) if in_memory and chosen else source

    train, kept = stratified_split(labels, held_out)
    return ImageData(
        name=str(folder),
        train=part(train),
        held_out=part(kept) if len(kept) else None,
        class_names=class_names,
        channels=channels,
        image_size=image_size,
        skipped=skipped,
        left_out=left_out,
    )
