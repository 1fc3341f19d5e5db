"""Handwritten digits, 1,797 real 8×8 images that come with scikit-learn: no download."""

from __future__ import annotations

import torch

from ..errors import UsageError
from .images import ImageData, TensorImages, stratified_split


def load_digits_data(held_out: float = 0.2) -> ImageData:
    """The digits as (1, 8, 8) images in [-1, 1], a share of each class held out.

    The images are UCI's optical recognition set (E. Alpaydin, C. Kaynak, 1998), as `sklearn.datasets.load_digits` has
    them: 17 grey levels, 0 to 16.
    """
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise UsageError(
            'data: the digits come with scikit-learn, which is not installed: pip install "meanflow[demo]"'
        ) from error
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 8.0 - 1.0  # [n, 1, 8, 8]
    labels = torch.from_numpy(targets).long()  # [n]
    train, kept = stratified_split(labels, held_out)
    return ImageData(
        name="digits",
        train=TensorImages(images[train], labels[train]),
        held_out=TensorImages(images[kept], labels[kept]) if len(kept) else None,
        class_names=tuple(str(digit) for digit in range(10)),
        channels=1,
        image_size=8,
    )
