"""WebDataset: images in tar files, read where they are in them, in any order."""

from __future__ import annotations

import json
import os
import re
import tarfile
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from glob import glob
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tqdm import tqdm

from ..errors import UsageError
from ..files import check_regular, read_text, shown
from ..options import option
from ..registry import register
from .encoded import SUFFIXES, EncodedImage, FoundImages
from .sources import EncodedSource

OPEN_TARS = 128  # files that a process keeps open
MOST_CLASSES = 10**6  # a larger label is a mistake, and each class has a row of weights
COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
# the rules of the webdataset library, tariterators.py: what is the key of a sample, and which members are passed over
_NAME = re.compile(r"((?:.*/)?[^.]+)\.([^/]*)")
_META = re.compile(r"__[^/]*__($|/)")
Members = dict[str, tarfile.TarInfo]  # of a sample, by extension


class _OpenFile:
    """A file that is open for as long as somebody has it: no thread closes it while another one reads."""

    def __init__(self, path: str) -> None:
        check_regular(Path(path))
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)

    def read(self, size: int, offset: int) -> bytes:
        return os.pread(self.descriptor, size, offset)  # has no position, which processes would share after a fork


class TarImages:
    """Images that are members of uncompressed tar files; each takes 32 bytes of memory.

    Args:
        tars: paths.
        places: (n, 4) int64, of each image: which tar, and in it the offset of its header, the offset and the size of
            its bytes.
    """

    def __init__(self, tars: Sequence[str], places: np.ndarray) -> None:
        self.tars, self.places = tars, places
        self.opened = lru_cache(OPEN_TARS)(_OpenFile)

    def __reduce__(self) -> tuple[type[TarImages], tuple[Sequence[str], np.ndarray]]:
        return type(self), (self.tars, self.places)  # another process opens its own files

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> TarImage:
        return TarImage(self, *self.places[index].tolist())


@dataclass(frozen=True)
class TarImage(EncodedImage):
    """One of them; its name is that of the tar, and its own in it."""

    images: TarImages
    tar: int
    header: int
    offset: int
    size: int

    def read(self) -> bytes:
        data = self.images.opened(self.images.tars[self.tar]).read(self.size, self.offset)
        if len(data) < self.size:
            raise OSError("the tar file ends within it")
        return data

    def __str__(self) -> str:
        path = self.images.tars[self.tar]
        try:
            check_regular(Path(path))
            with open(path, "rb") as file:
                file.seek(self.header)
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    member = tar.next()
        except (OSError, tarfile.TarError):
            member = None
        return f"{path}/{member.name}" if member is not None else f"{path}, byte {self.header}"


def expand_braces(pattern: str) -> list[str]:
    """`a-{000..146}.tar` and `{a,b}.tar` written out, as Bash does; braces within braces are not."""
    for found in re.finditer(r"\{([^{}]*)\}", pattern):
        span = re.fullmatch(r"(\d+)\.\.(\d+)(?:\.\.(\d+))?", found[1])
        if span is not None:
            low, high, step = int(span[1]), int(span[2]), int(span[3] or 1) or 1
            padded = any(len(end) > 1 and end.startswith("0") for end in span.group(1, 2))
            width = max(map(len, span.group(1, 2))) if padded else 0
            numbers = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
            words = [f"{number:0{width}}" for number in numbers]
        elif "," in found[1]:
            words = found[1].split(",")
        else:
            continue
        rest = expand_braces(pattern[found.end() :])
        return [pattern[: found.start()] + word + end for word in words for end in rest]
    return [pattern]


def find_tars(pattern: str) -> list[str]:
    """The tar files that a pattern stands for: a file, a folder, a glob, braces; several with "::" between them.

    Raises:
        UsageError: there are none, or they are compressed.
    """
    tars: list[str] = []
    for part in pattern.split("::"):
        whole = os.path.expanduser(part)
        for path in [whole] if os.path.exists(whole) else expand_braces(whole):
            exists = [path] if os.path.exists(path) else sorted(glob(path))
            found = _tars_in(path) if os.path.isdir(path) else exists
            if not found:
                raise UsageError(f"data: no tar file {path}{'/*.tar' if os.path.isdir(path) else ''}")
            tars += found
    for tar in tars:
        if tar.endswith(COMPRESSED):
            raise _compressed(tar)
    return tars


def _tars_in(folder: str) -> list[str]:
    """Tar files of a folder, with the compressed ones of which it has no plain copy."""
    names = sorted(name for name in os.listdir(folder) if not name.startswith("."))
    plain = {name for name in names if name.endswith(".tar")}
    packed = {name for name in names if name.endswith(COMPRESSED)}
    packed = {name for name in packed if re.sub(r"\.(tar\.\w+|tgz)$", ".tar", name) not in plain}
    return [os.path.join(folder, name) for name in names if name in plain | packed]


def _compressed(tar: str) -> UsageError:
    return UsageError(
        f"data: {tar} is compressed, and no image in it can be read without all that comes before. Expected plain tar "
        "files, whose images a run reads in an order of its own, in which it can be resumed at any step: decompress it "
        "once, such as with `gzip -dk`"
    )


def samples_of(path: str, bar: tqdm[Any]) -> Iterator[tuple[str, Members]]:
    """(key, members) of each sample of a tar in order, by the webdataset library's rules; `bar` counts the bytes.

    A file that has no key is a sample of its own, without a key.

    Raises:
        UsageError: it is no tar file, is damaged, or has two members of one name in a sample.
    """
    key, members = "", Members()
    start = bar.n
    try:
        check_regular(Path(path))
        with tarfile.open(path, "r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # it would keep them all
                bar.update(start + tar.offset - bar.n)
                if not member.isreg() or _META.match(member.name):
                    continue
                if member.issparse():
                    raise UsageError(f"data: {path}/{member.name} is a sparse file; expected its bytes in one piece")
                found = _NAME.fullmatch(member.name)
                if found is None:
                    yield "", {"": member}
                    continue
                if found[1] != key and members:
                    yield key, members
                    members = {}
                key, extension = found[1], found[2].lower()
                if extension in members:
                    raise UsageError(f"data: {path}/{member.name} is there twice; expected one in each sample")
                members[extension] = member
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            block = tar.fileobj.read(tarfile.BLOCKSIZE)  # tarfile takes what is no header, and the file's end, for it
            if any(block):
                raise tarfile.ReadError(f"no header at byte {tar.offset}")
            if len(block) < tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"unexpected end of data at byte {tar.offset}, without an end-of-archive block")
    except (OSError, tarfile.TarError) as error:
        if isinstance(error, tarfile.TarError) and _OpenFile(path).read(8, 0).startswith(MAGIC):
            raise _compressed(path) from error
        raise UsageError(f"data: cannot read the tar file {path}: {error}") from error
    if members:
        yield key, members


class _Labels:
    """The labels of samples, from where `label_from` says, or from where the first sample has one.

    numbers: one per sample that `add` was given.
    folders: the number of each folder, where the labels are folders.
    """

    def __init__(self, label_from: str, label_key: str) -> None:
        self.label_from, self.label_key = label_from, label_key
        self.numbers = array("q")
        self.folders: dict[str, int] = {}

    def add(self, where: str, key: str, members: Members, file: _OpenFile) -> None:
        """The label of one more sample; `where` begins messages.

        Raises:
            UsageError: the sample has no label.
        """
        if self.label_from == "auto":
            self.label_from = next((kind for kind in ("cls", "json") if kind in members), "auto")
        if self.label_from == "none":
            self.numbers.append(0)
        elif self.label_from == "folder":
            folder = key.rpartition("/")[0].rpartition("/")[2]
            if folder in ("", ".", ".."):
                raise UsageError(f"{where} is in no folder of the tar, from which its class was to come")
            self.numbers.append(self.folders.setdefault(folder, len(self.folders)))
        elif self.label_from not in members:
            kinds = ".cls or .json" if self.label_from == "auto" else f".{self.label_from}, as other samples have"
            raise UsageError(
                f"{where} has no label: no {kinds}. With --label-from folder its class is the folder that it is in, "
                "with none all images are of one class"
            )
        else:
            member = members[self.label_from]
            self.numbers.append(self._number(where, file.read(member.size, member.offset_data)))

    def _number(self, where: str, data: bytes) -> int:
        expected = f"{where}.{self.label_from}: expected an integer from 0 to {MOST_CLASSES}"
        try:
            label = int(data) if self.label_from == "cls" else json.loads(data)
        except (ValueError, RecursionError) as error:
            raise UsageError(f"{expected}, got {shown(data.decode(errors='replace'))}") from error
        if self.label_from == "json":
            label = label.get(self.label_key) if isinstance(label, dict) else None
            expected += f" as {shown(self.label_key)} (--label-key)"
        if type(label) is not int or not 0 <= label <= MOST_CLASSES:
            raise UsageError(f"{expected}, got {shown(label)}")
        return label


def find_tar_images(
    tars: Sequence[str],
    *,
    name: str,
    label_from: str = "auto",
    label_key: str = "label",
    image_key: str = "",
    class_names: Sequence[str] = (),
) -> FoundImages:
    """The images of WebDataset tars in their order. Headers and labels are read, the images are not.

    Args:
        name: of the data set, in messages.
        label_from, label_key, image_key: see `WebDataset`.
        class_names: of the labels 0, 1, …; none: the folders where the labels are folders, or else the numbers.

    Raises:
        UsageError: a tar cannot be read, there is no image, or an image has no label or one that has no name.
    """
    places, labels, skipped = array("q"), _Labels(label_from, label_key), 0
    opened = lru_cache(1)(_OpenFile)
    keys = (image_key,) if image_key else tuple(suffix.removeprefix(".") for suffix in SUFFIXES)
    total = sum(os.path.getsize(tar) for tar in tars)
    names: tuple[str, ...]
    with tqdm(total=total, desc="reading tar headers", unit="B", unit_scale=True, leave=False, disable=None) as bar:
        for number, tar in enumerate(tars):
            for key, members in samples_of(tar, bar):
                found = [member for extension, member in members.items() if extension in keys]
                if not found:
                    skipped += len(members)
                    continue
                if len(found) > 1:
                    several = ", ".join(member.name for member in found)
                    raise UsageError(f"data: {tar} has {several} in one sample; choose one with --image-key EXTENSION")
                labels.add(f"data: {tar}/{key}", key, members, opened(tar))
                places.extend((number, found[0].offset, found[0].offset_data, found[0].size))
    if not places:
        expected = f".{image_key}" if image_key else f"one of {', '.join(SUFFIXES)}"
        raise UsageError(f"data: no images in {name}; expected members that end in {expected}")
    images = TarImages(tars, np.frombuffer(places, dtype=np.int64).reshape(-1, 4))
    numbers = torch.frombuffer(labels.numbers, dtype=torch.int64)  # [n]
    if labels.label_from == "folder":
        names = tuple(class_names or sorted(labels.folders))
        unknown = [folder for folder in labels.folders if folder not in names]
        if unknown:
            raise UsageError(f"expected the names of all classes, and {unknown[0]} is none", field="class_names")
        numbers = torch.tensor([names.index(folder) for folder in labels.folders])[numbers]
    elif labels.label_from == "none":
        names = tuple(class_names) or ("all",)
    else:
        names = tuple(class_names) or tuple(map(str, range(int(numbers.max()) + 1)))
    beyond = (numbers >= len(names)).nonzero().flatten().tolist()
    if beyond:
        found_label = f"data: {images[beyond[0]]} has the label {numbers[beyond[0]]}"
        raise UsageError(f"{found_label}; expected 0 to {len(names) - 1}, one for each class name")
    return FoundImages(name, images, numbers, names, skipped)


@register("data", "wds")
@dataclass(frozen=True)
class WebDataset(EncodedSource):
    """Images in WebDataset tar files, read from them as training goes: `--data wds:PATTERN`.

    Args:
        tars: a tar file, a folder of them, a glob, or braces such as shard-{000..146}.tar
        label_from: cls: the integer in KEY.cls. json: a field of KEY.json. auto: cls, or else json, as the first sample
            has it. folder: the folder in the tar that the image is in. none: one class
        label_key: the field of KEY.json
        image_key: extension of the images, where samples have several
        class_names: file with the names of the classes 0, 1, ..., one a line; without it they are the numbers
    """

    tars: str = option("", flag=False)
    label_from: Literal["auto", "cls", "json", "folder", "none"] = "auto"
    label_key: str = "label"
    image_key: str = ""
    class_names: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        for part in self.tars.split("::"):
            remote = re.match(r"[A-Za-z][\w+.-]*:", part)
            if remote is not None and not os.path.exists(part):
                raise UsageError(
                    f"expected tar files of this machine, got wds:{self.tars}. What comes from {remote[0]} can only be "
                    "read from its start to its end, and a run reads images in an order of its own, in which it can be "
                    "resumed at any step: copy the tars to a disk",
                    field="data",
                )

    @staticmethod
    def named(place: str) -> dict[str, str]:
        """The values that `--data wds:place` stands for."""
        return {"tars": place}

    def find(self) -> FoundImages:
        """The images of the tars, one after the other."""
        if not self.tars:
            raise UsageError("say which tar files: `meanflow train --data wds:PATTERN`", field="data")
        return find_tar_images(
            find_tars(self.tars),
            name=f"wds:{self.tars}",
            label_from=self.label_from,
            label_key=self.label_key,
            image_key=self.image_key.removeprefix(".").lower(),
            class_names=_names_in(Path(self.class_names).expanduser()) if self.class_names else (),
        )

    def located(self) -> dict[str, Any]:
        """The absolute pattern, and what is read of the tars."""
        parts = self.tars.split("::") if self.tars else []
        # {/a,/b}/c.tar is two absolute paths
        places = [place for part in parts for place in (expand_braces(part) if part.startswith("{") else [part])]
        return {
            "tars": "::".join(os.path.abspath(os.path.expanduser(place)) for place in places),
            "label_from": self.label_from,
            "label_key": self.label_key,
            "image_key": self.image_key,
            "class_names": os.path.abspath(os.path.expanduser(self.class_names)) if self.class_names else "",
        }


def _names_in(path: Path) -> list[str]:
    """
    Raises:
        UsageError: the file cannot be read, or a name is missing or there twice.
    """
    try:
        names = [line.strip() for line in read_text(path).splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {path}: {error}", field="class_names") from error
    if not all(names) or len(set(names)) < len(names) or not names:
        raise UsageError(f"expected one name in each line of {path}, all different", field="class_names")
    return names
