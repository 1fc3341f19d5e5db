"""Every image of a folder read once, as training would: what `meanflow data check` does."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from .folder import find_images, read_image
from .left_out import UnreadableImage

AHEAD = 1024  # images that are handed to the threads at a time
SHOWN = 20  # classes


@dataclass(frozen=True)
class FolderCheck:
    """What a folder of images holds.

    classes: number of images of each class, by name.
    unreadable: those that cannot be read.
    readable: number of images of each class that can be.
    skipped: other files.
    """

    folder: Path
    classes: dict[str, int]
    unreadable: list[UnreadableImage]
    readable: dict[str, int]
    skipped: int

    def lines(self) -> Iterator[str]:
        """In words."""
        total = sum(self.classes.values())
        others = f", {self.skipped} other file{'s' if self.skipped > 1 else ''}" if self.skipped else ""
        yield f"{self.folder}: {total} images in {len(self.classes)} class{'es' * (len(self.classes) > 1)}{others}"
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
        empty = [name for name, count in self.readable.items() if count == 0]
        words = f"{len(self.unreadable)} of {total} images cannot be read"
        if empty:
            names = ", ".join(empty[:SHOWN]) + (", …" if len(empty) > SHOWN else "")
            yield f"{words}; none of {names}, and training needs one of each class"
        else:
            yield f"{words}; `meanflow train --skip-unreadable` leaves them out"


def check_folder(folder: Path, *, image_size: int, grey: bool = False) -> FolderCheck:
    """Read every image of `folder`; a bar on stderr shows how far it is.

    Raises:
        UsageError: the folder cannot be used at all.
    """
    paths, labels, class_names, skipped = find_images(folder)

    def attempt(path: Path) -> UnreadableImage | None:
        try:
            read_image(path, image_size, grey=grey)
        except UnreadableImage as error:
            return error
        return None

    counts = labels.bincount(minlength=len(class_names))
    readable = counts.clone()
    unreadable = []
    pool = ThreadPoolExecutor()
    try:
        with tqdm(total=len(paths), desc="reading images", leave=False, disable=None) as bar:
            for first in range(0, len(paths), AHEAD):
                some: Sequence[Path] = paths[first : first + AHEAD]
                for i, error in enumerate(pool.map(attempt, some), start=first):
                    bar.update()
                    if error is not None:
                        unreadable.append(error)
                        readable[labels[i]] -= 1
    finally:
        pool.shutdown(cancel_futures=True)
    return FolderCheck(
        folder=folder,
        classes=dict(zip(class_names, counts.tolist(), strict=True)),
        unreadable=unreadable,
        readable=dict(zip(class_names, readable.tolist(), strict=True)),
        skipped=skipped,
    )
