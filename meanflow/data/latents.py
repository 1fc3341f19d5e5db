"""A folder of latents, as `meanflow encode` writes it: posteriors of an autoencoder, sampled anew in each step.

latents-00000.safetensors …   posterior (n, 2C, h, w): means, then standard deviations, neither shifted nor scaled;
                              mirrored (n, 2C, h, w): of the mirrored images; labels (n,) int64
index.json                    what they are of, and the checksum of each file
"""

from __future__ import annotations

import json
import math
import os
import weakref
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, draw_latents
from ..errors import UsageError
from ..files import check_regular, is_number, parse_json, read_text, reason, shown, write_text
from ..options import option
from ..registry import find, is_code, names, register
from .images import ImageData, stratified_split
from .sources import DataSource

INDEX = "index.json"
PLAN = "encoding.json"  # what an unfinished folder is to hold
FORMAT = 1
POSTERIOR, MIRRORED, LABELS = "posterior", "mirrored", "labels"  # tensors of a file
DTYPES = {"float32": torch.float32, "float16": torch.float16}
OPEN_FILES = 256  # of each process
ANEW = "Remove it, and the same `meanflow encode` makes it anew"


@dataclass(frozen=True)
class Shard:
    """One file of latents.

    count: images, without their mirrored versions.
    size: in bytes.
    checksum: CRC-32 of the file, see `meanflow.files.checksum`.
    total, squares: sums over its images, mirrored ones too, of each channel's latents and of their squares.
    """

    file: str
    count: int
    size: int
    checksum: str
    total: tuple[float, ...]
    squares: tuple[float, ...]

    @classmethod
    def of(cls, values: Any) -> Shard:
        """One of plain values, as JSON has them.

        Raises:
            ValueError, TypeError: they are of none.
        """
        given: dict[str, Any] = {key: tuple(a) if isinstance(a, list) else a for key, a in values.items()}
        shard = cls(**given)
        sizes_fit = all(type(n) is int and n >= 1 for n in (shard.count, shard.size))
        if not sizes_fit or not isinstance(shard.file, str) or Path(shard.file).name != shard.file:
            raise ValueError(f"expected a file in this folder and its sizes, got {shown(values)}")
        if not all(is_number(a) for a in (*shard.total, *shard.squares)):
            raise ValueError(f"expected numbers, got {shown(values)}")
        return shard


@dataclass(frozen=True)
class LatentIndex:
    """What a folder of latents holds.

    source: what was encoded, in words.
    codec: the options of what encoded it, by name.
    image_shape, latent_shape: (C, H, W).
    labels: checksum of the labels.
    shard_size: images of a file.
    precision: that they were encoded in.
    """

    source: str
    codec: Mapping[str, Any]
    image_shape: tuple[int, int, int]
    latent_shape: tuple[int, int, int]
    dtype: str
    mirrored: bool
    class_names: tuple[str, ...]
    labels: str
    shard_size: int
    precision: str
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Number of images, without their mirrored versions."""
        return sum(shard.count for shard in self.shards)

    @property
    def bytes(self) -> int:
        """Size of all files."""
        return sum(shard.size for shard in self.shards)

    def in_words(self) -> str:
        """How many images of what, and what they take."""
        classes = f"{len(self.class_names)} class{'es' * (len(self.class_names) > 1)}"
        versions = "with their mirrored versions" if self.mirrored else "without mirrored versions"
        shape, size = "×".join(map(str, self.latent_shape)), f"{self.bytes / 2**20:,.0f} MiB"
        return f"{self.count} images in {classes}, {versions}: latents of {shape}, {size} in {len(self.shards)} files"

    def statistics(self) -> tuple[list[float], list[float]]:
        """Mean and standard deviation of each channel's latents as they are trained on."""
        n = self.count * (1 + self.mirrored) * self.latent_shape[1] * self.latent_shape[2]  # values of a channel
        mean = torch.tensor([shard.total for shard in self.shards], dtype=torch.float64).sum(dim=0) / n  # [C]
        square = torch.tensor([shard.squares for shard in self.shards], dtype=torch.float64).sum(dim=0) / n  # [C]
        return mean.tolist(), (square - mean.square()).clamp(min=0).sqrt().tolist()

    def write(self, folder: Path) -> None:
        """Write index.json."""
        mean, std = self.statistics()
        values = {"format": FORMAT, "count": self.count, "mean": mean, "std": std, **asdict(self)}
        write_text(folder / INDEX, json.dumps(values, indent=1) + "\n")

    @classmethod
    def read(cls, folder: Path) -> LatentIndex:
        """That of a folder.

        Raises:
            UsageError: there is none, or it is damaged.
        """
        path = folder / INDEX
        if not path.is_file() and (folder / PLAN).is_file():
            raise UsageError(f"data: not all of {folder} is encoded: start the same `meanflow encode` again")
        try:
            values: dict[str, Any] = dict(parse_json(read_text(path)))
            found = values.pop("format", None)
            if found != FORMAT:
                raise ValueError(f"expected format {FORMAT}, got {shown(found)}")
            count, _, _ = (values.pop(name) for name in ("count", "mean", "std"))
            shards = tuple(map(Shard.of, values.pop("shards")))
            values = {key: tuple(a) if isinstance(a, list) else a for key, a in values.items()}
            index = cls(shards=shards, **values)
            index._check(count)
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            raise UsageError(f"data: cannot read {path}: {reason(error)}; encode the images anew") from error
        return index

    def _check(self, count: Any) -> None:
        for name in ("image_shape", "latent_shape"):
            shape = getattr(self, name)
            if (
                not isinstance(shape, tuple)
                or len(shape) != 3
                or not all(type(n) is int and 0 < n < 2**20 for n in shape)
            ):
                raise ValueError(f"{name}: expected three sizes, got {shown(shape)}")
            if shape[1] != shape[2]:
                raise ValueError(f"{name}: expected a square, got {shown(shape)}")
        if type(self.mirrored) is not bool:
            raise ValueError(f"mirrored: expected true or false, got {shown(self.mirrored)}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype: expected {' or '.join(DTYPES)}, got {shown(self.dtype)}")
        if not isinstance(self.codec, dict) or not isinstance(self.codec.get("name"), str):
            raise ValueError(f"codec: expected a name and its options, got {shown(self.codec)}")
        if is_code(self.codec["name"]):  # a file is not to say what code runs
            raise ValueError(f"codec: expected one of {', '.join(names('codecs'))}, got {shown(self.codec['name'])}")
        classes = self.class_names
        is_names = isinstance(classes, tuple) and all(isinstance(name, str) for name in classes)
        if not is_names or len(set(classes)) < len(classes) or not classes:
            raise ValueError(f"class_names: expected different names, got {shown(classes)}")
        files = [shard.file for shard in self.shards]
        if not files or len(set(files)) < len(files):
            raise ValueError(f"shards: expected different files, got {shown(files)}")
        if any(len(sums) != self.latent_shape[0] for shard in self.shards for sums in (shard.total, shard.squares)):
            raise ValueError(f"shards: expected sums of {self.latent_shape[0]} channels")
        if count != self.count:
            raise ValueError(f"count: expected {self.count}, the sum over its files, got {shown(count)}")


class LatentImages:
    """Posteriors read from files as they are asked for.

    Indices from len(self) on are those of the mirrored versions, where there are some.

    Args:
        folder: of the latents.
        rows: (n,) int64, which of its images these are.
        labels: (n,) int64.
    """

    def __init__(self, folder: Path, index: LatentIndex, codec: Codec, rows: Tensor, labels: Tensor) -> None:
        self.folder, self.index, self.codec, self.labels = folder, index, codec, labels
        self.mirrored = index.mirrored
        self._rows = rows
        self._first = [0, *accumulate(shard.count for shard in index.shards)]  # row of each file's first image
        self._open: OrderedDict[int, _OpenShard] = OrderedDict()  # the last used one at the end
        self._device = torch.device("cpu")

    def decoding_with(self, codec: Codec, device: torch.device | str) -> LatentImages:
        """The same, whose `images` are decoded by `codec`, which has the same latents, on `device`."""
        images = LatentImages(self.folder, self.index, codec, self._rows, self.labels)
        images._device = torch.device(device)
        return images

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_open": OrderedDict()}  # for a worker process; an open file cannot be sent

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """(2C, h, w) posterior, and the label."""
        x, y = self.batch([index])
        return x[0], int(y[0])

    def batch(self, indices: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(n, 2C, h, w) float32 posteriors, and (n,) labels.

        Raises:
            UsageError: a file cannot be read.
        """
        n, (C, h, w) = len(self), self.index.latent_shape
        x = torch.empty(len(indices), 2 * C, h, w, dtype=DTYPES[self.index.dtype])
        for place, i in zip(x, indices, strict=True):
            row = int(self._rows[i % n])
            k = bisect_right(self._first, row) - 1
            self._shard(k).read(MIRRORED if i >= n else POSTERIOR, row - self._first[k], place)
        return x.float(), self.labels[[i % n for i in indices]]

    def _shard(self, k: int) -> _OpenShard:
        if k not in self._open:
            self._open[k] = _OpenShard(self.folder, self.index, k)
            if len(self._open) > OPEN_FILES:
                self._open.popitem(last=False)
        self._open.move_to_end(k)
        return self._open[k]

    def images(self, indices: Sequence[int] | None = None) -> Tensor:
        """(n, C, H, W) float32 on the CPU: the means decoded."""
        chosen = range(len(self)) if indices is None else indices
        images = []
        for i in range(0, len(chosen), 64):
            x = self.batch(chosen[i : i + 64])[0].to(self._device)  # [64, 2C, h, w]
            latents = draw_latents(self.codec, x, x.new_zeros(len(x), *self.index.latent_shape))
            images.append(self.codec.decode(latents).cpu())
        return torch.cat(images)


class _OpenShard:
    """A file of latents that is open, as far as the index says what is in it.

    Rows are read by their place in the file. A mapping would do as well, but the kernel maps the pages around each row
    with it, up to 2 MiB, so that soon the whole data set counts as memory of each process that reads it.

    Raises:
        UsageError: it is missing, or not what the index says.
    """

    def __init__(self, folder: Path, index: LatentIndex, k: int) -> None:
        shard = index.shards[k]
        self.path = folder / shard.file
        channels, *sides = index.latent_shape
        shape = [shard.count, 2 * channels, *sides]
        expected = {LABELS: [shard.count], POSTERIOR: shape, **({MIRRORED: shape} if index.mirrored else {})}
        dtypes = {name: "I64" if name == LABELS else index.dtype.replace("float", "F") for name in expected}
        try:
            check_regular(self.path)
            self._handle = os.open(self.path, os.O_RDONLY)
            weakref.finalize(self, os.close, self._handle)
            size = os.fstat(self._handle).st_size
            if size != shard.size:
                raise ValueError(f"expected {shard.size} bytes, found {size}")
            length = int.from_bytes(os.pread(self._handle, 8, 0), "little")  # of safetensors' header
            if not 0 < length < size:
                raise ValueError("it is no safetensors file")
            header = parse_json(os.pread(self._handle, length, 8))
            self._first = {}
            for name, wanted in expected.items():
                first, end = (8 + length + offset for offset in header[name]["data_offsets"])
                n = math.prod(wanted) * (8 if name == LABELS else DTYPES[index.dtype].itemsize)
                fits = type(first) is int and first >= 8 + length and end == first + n and end <= size
                if header[name]["shape"] != wanted or header[name]["dtype"] != dtypes[name] or not fits:
                    raise ValueError(f"expected {name} of shape {wanted} and {dtypes[name]}, got {shown(header[name])}")
                self._first[name] = first
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"data: cannot read {self.path}: {reason(error)}. {ANEW}") from error

    def read(self, name: str, row: int, into: Tensor) -> None:
        """Fill a contiguous tensor of the file's dtype from row `row` on."""
        place = into.numpy().data.cast("B")
        if os.preadv(self._handle, [place], self._first[name] + row * len(place)) != len(place):
            raise UsageError(f"data: cannot read {self.path}: it has become shorter. {ANEW}")

    def labels(self, count: int) -> Tensor:
        """(count,) int64."""
        labels = torch.empty(count, dtype=torch.int64)
        self.read(LABELS, 0, labels)
        return labels


def read_labels(folder: Path, index: LatentIndex) -> Tensor:
    """(n,) int64, of all images; every file is looked at.

    Raises:
        UsageError: a file is missing or damaged.
    """
    return torch.cat([_OpenShard(folder, index, k).labels(shard.count) for k, shard in enumerate(index.shards)])


@register("data", "latents")
@dataclass(frozen=True)
class Latents(DataSource):
    """A folder of latents, as `meanflow encode` writes it; the network trains on them with the codec that made them.

    Args:
        folder: where it is
    """

    folder: str = option("", flag=False)

    def load(self) -> ImageData:
        """The images as posteriors of their latents, `codec` being what made them."""
        folder = Path(self.folder).expanduser()
        index = LatentIndex.read(folder)
        if self.flip and not index.mirrored:
            raise UsageError(
                f"{folder} has no mirrored versions, and the latent of a mirrored image is not a mirrored latent; "
                "encode the images to another folder, without --no-mirrored",
                field="flip",
            )
        codec = codec_of(index)
        labels = read_labels(folder, index)
        low, high = (int(a) for a in labels.aminmax())
        if low < 0 or high >= len(index.class_names):
            raise UsageError(
                f"data: {folder}: expected labels from 0 to {len(index.class_names) - 1}, one for each class name, got "
                f"{low} to {high}"
            )
        train, kept = stratified_split(labels, self.held_out)
        channels, side, _ = index.image_shape
        return ImageData(
            name=str(folder),
            train=LatentImages(folder, index, codec, train, labels[train]),
            held_out=LatentImages(folder, index, codec, kept, labels[kept]) if len(kept) else None,
            class_names=index.class_names,
            channels=channels,
            image_size=side,
            codec=codec,
        )

    def located(self) -> dict[str, Any]:
        """The folder's absolute path."""
        return {"folder": str(Path(self.folder).expanduser().resolve()) if self.folder else ""}


def is_latents(folder: Path | str) -> bool:
    """Whether a folder holds latents, all or some of those that it is to hold."""
    return any((Path(folder).expanduser() / name).is_file() for name in (INDEX, PLAN))


def codec_of(index: LatentIndex) -> Codec:
    """The codec that made latents.

    Raises:
        UsageError: there is none of its name or with its options.
    """
    options = dict(index.codec)
    try:
        codec: Codec = find("codecs", options.pop("name"))(**options)
    except TypeError as error:
        raise UsageError(f"data: the index of the latents names a codec with other options: {error}") from error
    return codec
