"""A folder of images: one sub-folder per class."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import UsageError
from .encoded import SUFFIXES, FoundImages, load_images
from .images import ImageData

PARTS = ("train", "training", "val", "valid", "validation", "test", "testing", "dev")  # of other people's data sets


def find_images(folder: Path) -> FoundImages:
    """Image files of a folder with one sub-folder per class, in sorted order; labels number the sorted sub-folders.

    Files and folders whose names begin with a dot are not looked at.

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
    names = tuple(entry.name for entry in classes)
    return FoundImages(str(folder), paths, torch.tensor(labels), names, skipped=others)


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
    """The images of a folder, a share of each class held out; see `load_images`.

    Raises:
        UsageError: the folder or an image in it cannot be used, or no image of a class; the message names it.
    """
    return load_images(
        find_images(folder), image_size=image_size, grey=grey, held_out=held_out, skip_unreadable=skip_unreadable
    )
