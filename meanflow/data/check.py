"""Every image, or every file of latents, of a data set read once: what `meanflow data check` does."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ..files import checksum
from .encoded import FoundImages, read_image
from .latents import LatentIndex
from .left_out import UnreadableImage

AHEAD = 1024  # images that are handed to the threads at a time
SHOWN = 20  # classes


@dataclass(frozen=True)
class ImageCheck:
    """What a data set of images holds.

    classes: number of images of each class, by name.
    unreadable: those that cannot be read.
    readable: number of images of each class that can be.
    skipped: other files.
    """

    name: str
    classes: dict[str, int]
    unreadable: list[UnreadableImage]
    readable: dict[str, int]
    skipped: int

    def lines(self) -> Iterator[str]:
        """In words."""
        total = sum(self.classes.values())
        others = f", {self.skipped} other file{'s' if self.skipped > 1 else ''}" if self.skipped else ""
        yield f"{self.name}: {total} images in {len(self.classes)} class{'es' * (len(self.classes) > 1)}{others}"
        shown = dict(islice(self.classes.items(), SHOWN))
        width = max(map(len, shown))
        yield from (f"  {name:<{width}}  {count}" for name, count in shown.items())
        if len(self.classes) > SHOWN:
            least, most = min(self.classes.values()), max(self.classes.values())
            yield f"  … and {len(self.classes) - SHOWN} more classes; {least} to {most} images in each"
        for error in self.unreadable:
            yield f"{error.path}: {error.reason}"
        if not self.unreadable:
            yield "every image can be read"
            return
        empty = [name for name, count in self.readable.items() if count == 0 and self.classes[name] > 0]
        words = f"{len(self.unreadable)} of {total} images cannot be read"
        if empty:
            names = ", ".join(empty[:SHOWN]) + (", …" if len(empty) > SHOWN else "")
            yield f"{words}; none of {names}, and training needs one of each class"
        else:
            yield f"{words}; `meanflow train --skip-unreadable` leaves them out"


def check_images(found: FoundImages, *, image_size: int, grey: bool = False) -> ImageCheck:
    """Read every image of a data set; a bar on stderr shows how far it is."""

    def attempt(index: int) -> UnreadableImage | None:
        try:
            read_image(found.images[index], image_size, grey=grey)
        except UnreadableImage as error:
            return error
        return None

    counts = found.labels.bincount(minlength=len(found.class_names))
    readable = counts.clone()
    unreadable = []
    pool = ThreadPoolExecutor()
    try:
        with tqdm(total=len(found.labels), desc="reading images", leave=False, disable=None) as bar:
            for first in range(0, len(found.labels), AHEAD):
                some = range(first, min(first + AHEAD, len(found.labels)))
                for i, error in zip(some, pool.map(attempt, some), strict=True):
                    bar.update()
                    if error is not None:
                        unreadable.append(error)
                        readable[found.labels[i]] -= 1
    finally:
        pool.shutdown(cancel_futures=True)
    return ImageCheck(
        name=found.name,
        classes=dict(zip(found.class_names, counts.tolist(), strict=True)),
        unreadable=unreadable,
        readable=dict(zip(found.class_names, readable.tolist(), strict=True)),
        skipped=found.skipped,
    )


@dataclass(frozen=True)
class LatentCheck:
    """What a folder of latents holds.

    damaged: what is wrong, by the name of the file.
    """

    folder: Path
    index: LatentIndex
    damaged: dict[str, str]

    def lines(self) -> Iterator[str]:
        """In words."""
        yield f"{self.folder}: {self.index.in_words()}"
        yield from (f"{self.folder / name}: {reason}" for name, reason in self.damaged.items())
        if self.damaged:
            count = f"{len(self.damaged)} of {len(self.index.shards)} files"
            yield f"{count} are damaged; remove them, and the same `meanflow encode` makes them anew"
        else:
            yield "every file is as it was written"


def check_latents(folder: Path) -> LatentCheck:
    """Compare every file of a folder of latents with its checksum; a bar on stderr shows how far it is.

    Raises:
        UsageError: the folder has no index, or it is damaged.
    """
    index = LatentIndex.read(folder)
    damaged = {}
    for shard in tqdm(index.shards, desc="reading latents", leave=False, disable=None):
        try:
            found = checksum(folder / shard.file)
            if found != shard.checksum:
                damaged[shard.file] = f"expected the checksum {shard.checksum}, got {found}"
        except OSError as error:
            damaged[shard.file] = error.strerror or str(error)
    return LatentCheck(folder, index, damaged)
