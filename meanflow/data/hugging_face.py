"""Hugging Face `datasets`: images in a table on this machine, read by row."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError
from ..files import check_regular
from ..options import option
from ..registry import register
from .encoded import EncodedImage, FoundImages
from .sources import EncodedSource

SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` leaves of a split, and of several


class TableImages:
    """Images in the rows of a table, which is mapped into memory.

    Args:
        rows: a `datasets.Dataset` of which `column` holds encoded images.
        name: of the data set, in messages.
    """

    def __init__(self, rows: Any, column: str, name: str) -> None:
        self.rows, self.column, self.name = rows, column, name

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> TableImage:
        return TableImage(self, index)


@dataclass(frozen=True)
class TableImage(EncodedImage):
    """One of them."""

    images: TableImages
    row: int

    def read(self) -> bytes:
        """Those in the table, or else of the file that it names."""
        image = self.images.rows[self.row][self.images.column]
        if image is None:
            raise OSError("there is none")
        data: bytes | None = image["bytes"]
        if data is not None:
            return data
        path = Path(image["path"])
        check_regular(path)
        return path.read_bytes()

    def __str__(self) -> str:
        return f"{self.images.name}, row {self.row}"


@register("data", "hf")
@dataclass(frozen=True)
class HuggingFace(EncodedSource):
    """Images of a Hugging Face data set, as a table on this machine: `--data hf:NAME_OR_PATH[:SPLIT]`.

    Args:
        dataset: its name on the Hub, or a folder: of `save_to_disk`, or of files that `load_dataset` reads
        split: part of it, such as train or train[:10%]
        subset: which one, of a data set with several configurations
        image_column: column of the images; without it the first that holds images
        label_column: column of the labels; without it that of class labels, or "label". none: one class
    """

    dataset: str = option("", flag=False)
    split: str = option("", flag=False)
    subset: str = ""
    image_column: str = ""
    label_column: str = ""

    @staticmethod
    def named(place: str) -> dict[str, str]:
        """The values that `--data hf:place` stands for."""
        dataset, _, split = place.partition(":")
        return {"dataset": dataset, "split": split}

    @property
    def _name(self) -> str:
        return f"hf:{self.dataset}{f':{self.split}' if self.split else ''}"

    def find(self) -> FoundImages:
        """The rows of the split, in their order."""
        if not self.dataset:
            raise UsageError("say which data set: `meanflow train --data hf:NAME_OR_PATH`", field="data")
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise UsageError(
                f'{self._name} is read with datasets, which is not installed: pip install "meanflow[datasets]"',
                field="data",
            ) from error
        table = self._table()
        image = self._image_column(table)
        labels, class_names = self._labels(table)
        rows = table.select_columns([image]).cast_column(image, datasets.Image(decode=False))
        return FoundImages(self._name, TableImages(rows, image, self._name), labels, class_names)

    def _table(self) -> Any:
        """The `datasets.Dataset`."""
        import datasets

        folder = Path(self.dataset).expanduser()
        saved = any((folder / name).is_file() for name in SAVED)
        if saved and self.subset:
            raise UsageError("expected only with a data set of several configurations", field="subset")
        try:
            if not saved:
                place = str(folder) if folder.is_dir() else self.dataset
                return datasets.load_dataset(place, self.subset or None, split=self.split or "train")
            found = datasets.load_from_disk(folder)
        except Exception as error:  # of the network, the Hub, a file, or what a data set is written in
            said = " ".join(str(error).split()) or type(error).__name__
            raise UsageError(f"cannot load {self._name}: {said}", field="data") from error
        if isinstance(found, datasets.DatasetDict):
            split = self.split or "train"
            if split not in found:
                raise UsageError(f"{self.dataset} has the splits {', '.join(found)}; got {split}", field="data")
            return found[split]
        if self.split:
            raise UsageError(f"{self.dataset} was saved without splits; got {self.split}", field="data")
        return found

    def _image_column(self, table: Any) -> str:
        import datasets

        images = [name for name, feature in table.features.items() if isinstance(feature, datasets.Image)]
        column = self.image_column or next(iter(images), "")
        if not column:
            raise UsageError(
                f"{self._name} has no column of images; choose one of {', '.join(table.features)}", field="image_column"
            )
        if column not in table.features:
            raise UsageError(f"expected one of {', '.join(table.features)}, got {column}", field="image_column")
        storable = (datasets.Value("binary"), {"bytes": datasets.Value("binary"), "path": datasets.Value("string")})
        if column not in images and table.features[column] not in storable:
            raise UsageError(
                f"expected a column of images, got {column}, of {table.features[column]}", field="image_column"
            )
        return column

    def _labels(self, table: Any) -> tuple[Tensor, tuple[str, ...]]:
        """(n,) labels and the names of the classes."""
        import datasets

        if self.label_column == "none":
            return torch.zeros(len(table), dtype=torch.int64), ("all",)
        classes = [name for name, feature in table.features.items() if isinstance(feature, datasets.ClassLabel)]
        column = self.label_column or next(iter(classes), "label")
        if column not in table.features:
            raise UsageError(
                f"expected one of {', '.join(table.features)}, or none to train without classes; got "
                f"{column if self.label_column else 'no column, and there is none of class labels'}",
                field="label_column",
            )
        arrow = table.select_columns([column]).with_format("arrow")[:][column]
        if arrow.null_count:
            raise UsageError(f"{arrow.null_count} of {len(table)} rows have no label in {column}", field="label_column")
        values = arrow.to_numpy()
        if column not in classes:
            if values.dtype.kind not in "iuOUT":
                raise UsageError(f"expected integers or text, got {column}, of {values.dtype}", field="label_column")
            names, labels = np.unique(values, return_inverse=True)
            return torch.from_numpy(labels.astype(np.int64)), tuple(map(str, names.tolist()))
        names = table.features[column].names
        wrong = np.flatnonzero((values < 0) | (values >= len(names)))
        if len(wrong):
            raise UsageError(
                f"row {wrong[0]} has {values[wrong[0]]} in {column}; expected 0 to {len(names) - 1}",
                field="label_column",
            )
        return torch.from_numpy(values.astype(np.int64)), tuple(names)

    def located(self) -> dict[str, Any]:
        """The name or the absolute path, and what is read of it."""
        folder = os.path.abspath(os.path.expanduser(self.dataset))
        return {
            "dataset": folder if self.dataset and os.path.exists(folder) else self.dataset,
            "split": self.split,
            "subset": self.subset,
            "image_column": self.image_column,
            "label_column": self.label_column,
        }
