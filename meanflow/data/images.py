"""Images with labels: what the trainer is fed and what the evaluation compares with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from ..checks import check_finite
from ..codecs import Codec
from ..errors import UsageError
from .left_out import LeftOut
from .order import Stream, generator_for


class ImageSource(Protocol):
    """Labelled images in [-1, 1], or other data of about unit size, such as 2-D points.

    A source may have `batch(indices)`, which gives images and labels of several at once, and `mirrored = True` where
    index i + len(source) is that of a mirrored version of image i. Where an item is encoded, `images` decodes it.
    """

    labels: Tensor  # [n] int64

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> tuple[Tensor, int]: ...

    def images(self, indices: Sequence[int] | None = None) -> Tensor: ...


class TensorImages:
    """Images held in memory.

    Args:
        images: (n, C, H, W) float32, in [-1, 1] if they are pixels, or uint8.
        labels: (n,) int64.

    Raises:
        ValueError: an image has a value that is not finite, or there are not as many labels.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(labels) != len(images):
            raise ValueError(f"labels: expected one for each of the {len(images)} images, got {len(labels)}")
        if images.is_floating_point():
            check_finite("images", images)
        self._images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return to_unit_range(self._images[index]), int(self.labels[index])

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) float32, all or those of `indices`."""
        return to_unit_range(self._images if indices is None else self._images[list(indices)])


def to_unit_range(images: Tensor) -> Tensor:
    """uint8 pixels as float32 in [-1, 1]; float images unchanged."""
    return images.float() / 127.5 - 1.0 if images.dtype == torch.uint8 else images


@dataclass(frozen=True)
class ImageData:
    """A data set: what is trained on, what is held out for evaluation (None: nothing), and the labels' names.

    skipped: files of its folder that are no images of a class.
    left_out: images that cannot be read, as far as they were met; None: such an image is an error.
    codec: what the images were encoded with, as which they then come; None: they are pixels, or points.

    Raises:
        ValueError: a label has no name.
    """

    name: str
    train: ImageSource
    held_out: ImageSource | None
    class_names: tuple[str, ...]
    channels: int
    image_size: int
    skipped: int = 0
    left_out: LeftOut | None = None
    codec: Codec | None = None

    def __post_init__(self) -> None:
        for part in (self.train, self.held_out):
            if part is not None and len(part):
                low, high = (int(a) for a in part.labels.aminmax())
                if low < 0 or high >= self.num_classes:
                    raise ValueError(
                        f"labels: expected 0 to {self.num_classes - 1}, one for each class name, got {low} to {high}"
                    )

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    def decoding_with(self, codec: Codec, device: torch.device | str) -> ImageData:
        """The same data, whose `images` are decoded by `codec` on `device`; pixels and points as they are."""
        if self.codec is None:
            return self
        held_out = self.held_out if self.held_out is None else _decoding_with(self.held_out, codec, device)
        return replace(self, train=_decoding_with(self.train, codec, device), held_out=held_out, codec=codec)

    def check_classes(self, names: Sequence[str], source: object) -> None:
        """Raise a UsageError unless the classes are `names`, those of `source`, in their order."""
        if tuple(names) == self.class_names:
            return
        words = "; ".join(
            f"{title} {', '.join(some[:5])}{' …' if len(some) > 5 else ''}"
            for title, some in (
                ("it lacks", [name for name in names if name not in self.class_names]),
                ("it has besides", [name for name in self.class_names if name not in names]),
            )
            if some
        )
        raise UsageError(f"data: {self.name} has other classes than {source}: {words or 'they are in another order'}")


def _decoding_with(source: Any, codec: Codec, device: torch.device | str) -> ImageSource:
    """A source of one's own decodes as it likes."""
    decoding: ImageSource = source.decoding_with(codec, device) if hasattr(source, "decoding_with") else source
    return decoding


def stratified_split(labels: Tensor, share: float, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Indices to train on and indices to hold out: `share` of each class (rounded), ascending.

    The split depends on `seed` alone; every run of a data set uses the default, so that their reports compare.
    """
    kept: list[Tensor] = []
    for label in labels.unique().tolist():
        members = (labels == label).nonzero().flatten()
        chosen = torch.randperm(len(members), generator=generator_for(seed, Stream.SPLIT, label))
        kept.append(members[chosen[: round(len(members) * share)]])
    mask = torch.zeros(len(labels), dtype=torch.bool)
    mask[torch.cat(kept)] = True
    return (~mask).nonzero().flatten(), mask.nonzero().flatten()
