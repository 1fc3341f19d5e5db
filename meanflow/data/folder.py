"""A folder of images: one sub-folder per class. Transparent images are put on white."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ..errors import UsageError
from .images import ImageData, ImageSource, TensorImages, stratified_split, to_unit_range

PARTS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")  # of other people's data sets
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
CACHE_BYTES = 2**30


def read_image(path: Path, size: int, *, grey: bool) -> Tensor:
    """Decode, put on white, turn as its EXIF says, scale the shorter side to `size` and cut out the centre.

    Returns:
        (1 or 3, size, size) uint8.

    Raises:
        UsageError: the file is no image that Pillow can read, or has more than 8 bits a channel.
    """
    try:
        with Image.open(path) as image:
            if image.mode.startswith(("I", "F")):
                raise UsageError(
                    f"data: {path} has more than 8 bits a channel (mode {image.mode}); convert it to 8 bits"
                )
            picture = _on_white(ImageOps.exif_transpose(image)).convert("L" if grey else "RGB")
            picture = ImageOps.fit(picture, (size, size), method=Image.Resampling.BICUBIC)
    except UsageError:
        raise
    except Exception as error:  # a damaged file raises what its decoder happens to run into
        raise UsageError(f"data: cannot read the image {path}: {error}") from error
    pixels = np.asarray(picture, dtype=np.uint8).reshape(size, size, -1)  # [H, W, C]
    return torch.from_numpy(pixels.copy()).permute(2, 0, 1).contiguous()


def _on_white(image: Image.Image) -> Image.Image:
    if image.mode not in ("RGBA", "LA", "PA") and "transparency" not in image.info:
        return image
    return Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))


class FolderImages:
    """Images decoded when they are asked for."""

    def __init__(self, paths: Sequence[Path], labels: Tensor, *, size: int, grey: bool) -> None:
        self.paths, self.labels, self.size, self.grey = list(paths), labels, size, grey

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_unit_range(read_image(self.paths[index], self.size, grey=self.grey)), int(self.labels[index])

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) float32, all or those of `indices`."""
        return to_unit_range(self.pixels(indices))

    def pixels(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) uint8, decoded by several threads; a bar shows how far it is."""
        chosen = range(len(self)) if indices is None else indices
        with ThreadPoolExecutor() as pool:
            decoded = pool.map(lambda i: read_image(self.paths[i], self.size, grey=self.grey), chosen)
            return torch.stack(list(tqdm(decoded, total=len(chosen), desc="reading images", leave=False, disable=None)))


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


def load_folder(folder: Path, *, image_size: int, grey: bool = False, held_out: float = 0.0) -> ImageData:
    """The images of a folder, a share of each class kept apart.

    Up to 1 GiB of pixels is decoded once, here, and kept in memory; more is decoded as training goes.

    Raises:
        UsageError: the folder or an image in it cannot be used; the message names it.
    """
    paths, labels, class_names, skipped = find_images(folder)
    lazy = FolderImages(paths, labels, size=image_size, grey=grey)
    channels = 1 if grey else 3
    pixels = lazy.pixels() if len(paths) * channels * image_size**2 <= CACHE_BYTES else None

    def part(indices: Tensor) -> ImageSource:
        if pixels is not None:
            return TensorImages(pixels[indices], labels[indices])
        return FolderImages([paths[i] for i in indices.tolist()], labels[indices], size=image_size, grey=grey)

    train, kept = stratified_split(labels, held_out)
    return ImageData(
        name=str(folder),
        train=part(train),
        held_out=part(kept) if len(kept) else None,
        class_names=class_names,
        channels=channels,
        image_size=image_size,
        skipped=skipped,
    )
