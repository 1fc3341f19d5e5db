"""Data sources: where images come from, as options of a run."""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..options import Options, option
from ..registry import register
from .digits import load_digits_data
from .encoded import FoundImages, load_images
from .folder import find_images
from .images import ImageData


@dataclass(frozen=True)
class DataSource(Options):
    """Labelled images. A source of your own is a frozen dataclass of this class with a `load`.

    Args:
        flip: mirror half of the images, drawn anew each time
        held_out: share of each class kept out of training, for the report's reference values
        workers: processes that decode images, when there are too many to keep in memory
    """

    flip: bool = False
    held_out: float = option(0.0, low=0.0, high=1.0, below=True)
    workers: int = option(2, low=0, high=1024)

    @abstractmethod
    def load(self) -> ImageData:
        """The images, or a description of where each is.

        Raises:
            UsageError: they cannot be used.
        """

    def located(self) -> dict[str, Any]:
        """The values that tell one set of images from another, the same from any working directory."""
        return {}


@register("data", "digits")
@dataclass(frozen=True)
class Digits(DataSource):
    """1,797 handwritten digits of 8×8 pixels, which come with scikit-learn."""

    def load(self) -> ImageData:
        """(1, 8, 8) images in ten classes."""
        return load_digits_data(self.held_out)


@dataclass(frozen=True)
class EncodedSource(DataSource):
    """Images as files or in files, decoded as they are needed where they are many. One of your own has a `find`.

    Args:
        image_size: side in pixels: images are scaled to it on their shorter side and cut to the centre
        grey: one grey channel instead of RGB
        skip_unreadable: an image that cannot be read: go on with another of its class in its place (`meanflow data
            check` names them all)
    """

    image_size: int = option(32, low=1, high=2**15)
    grey: bool = False
    skip_unreadable: bool = False

    @abstractmethod
    def find(self) -> FoundImages:
        """Where each image is, and its label.

        Raises:
            UsageError: they cannot be used.
        """

    def load(self) -> ImageData:
        """(3 or 1, image_size, image_size) images."""
        return load_images(
            self.find(),
            image_size=self.image_size,
            grey=self.grey,
            held_out=self.held_out,
            skip_unreadable=self.skip_unreadable,
        )


@register("data", "folder")
@dataclass(frozen=True)
class ImageFolder(EncodedSource):
    """A folder of images with one sub-folder per class.

    Args:
        folder: where it is
    """

    folder: str = option("", flag=False)

    def find(self) -> FoundImages:
        """The folder's image files."""
        if not self.folder:
            raise UsageError(
                "say what to train on: `meanflow train digits`, or `meanflow train --data FOLDER`", field="data"
            )
        return find_images(Path(self.folder).expanduser())

    def located(self) -> dict[str, Any]:
        """The folder's absolute path."""
        return {"folder": str(Path(self.folder).expanduser().resolve()) if self.folder else ""}
