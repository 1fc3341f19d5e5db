"""Files that are whole or not there, and reading those that may hold anything."""

from __future__ import annotations

import json
import os
import reprlib
import shutil
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

_DEEPEST = 20  # levels of a JSON file
_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = 60


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which an OSError that names no file, as that of a full disk does not, gets the name `path`."""
    try:
        yield
    except OSError as error:
        if error.filename is not None or error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def replaced(path: Path) -> Iterator[Path]:
    """A path of the same suffix to write to, which becomes `path` at the end of the block.

    `path` never holds half a file; where the block raises it is as before, and nothing else is left. An OSError says
    that it is no file that could be replaced.
    """
    path = Path(os.path.realpath(path))  # what a link points to
    check_regular(path)
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")
    try:
        with naming(path):
            yield partial
            os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def remove_folder(folder: Path) -> None:
    """Remove a folder that is there as a whole until it is gone: a kill leaves .NAME.removed.partial at most."""
    removed = folder.with_name(f".{folder.name}.removed.partial")
    shutil.rmtree(removed, ignore_errors=True)
    os.replace(folder, removed)
    shutil.rmtree(removed)


def remove_partials(folder: Path, *names: str) -> None:
    """Remove what `replaced` left of the files `names` in `folder` where a process was killed in it."""
    for path in map(Path, names):
        for partial in folder.glob(f".{path.stem}.*.partial{path.suffix}"):
            partial.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text file at once."""
    with replaced(path) as partial:
        partial.write_text(text)


def check_regular(path: Path) -> None:
    """Raise an OSError where `path` is a folder, a device or a pipe, which may have no end."""
    if path.exists() and not path.is_file():
        raise OSError(f"{path}: expected a file, got {'a folder' if path.is_dir() else 'a device'}")


def checksum(path: Path) -> str:
    """CRC-32 of a file, eight hexadecimal digits."""
    check_regular(path)
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            value = zlib.crc32(block, value)
    return f"{value:08x}"


def read_text(path: Path) -> str:
    """Text of a file.

    Raises:
        OSError, ValueError: it is no file, or not UTF-8.
    """
    check_regular(path)
    return path.read_text(encoding="utf-8")


def parse_json(text: str | bytes) -> Any:
    """What JSON says.

    Raises:
        ValueError: it is none, has a key twice (Python would keep the last one), no text, or is nested too deeply.
    """
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        value = None
    else:
        level = [value]
        for _ in range(_DEEPEST):
            if not all(is_text(item) for item in level if isinstance(item, str)):
                raise ValueError("it holds text that is none")
            level = [item for node in level for item in _items(node)]
            if not level:
                return value
    raise ValueError("it is nested too deeply")


def _items(node: Any) -> Iterable[Any]:
    if isinstance(node, dict):
        return [*node, *node.values()]
    return node if isinstance(node, list) else ()


def is_text(word: str) -> bool:
    """Whether `word` can be printed and name a file: no NUL, no half of a surrogate pair."""
    try:
        return b"\0" not in word.encode()
    except UnicodeEncodeError:
        return False


def is_number(value: Any) -> bool:
    """Whether `value` is a number that fits a float; NaN and infinity are."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**63)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"it has the key {shown(max(keys, key=keys.count))} twice")
    return values


def shown(value: Any) -> str:
    """A value of a file in a message: its start, where it is long."""
    try:
        return _SHORT.repr(value)
    except ValueError:  # an integer that Python refuses to print
        return f"a {type(value).__name__} of {value.bit_length()} bits"


def reason(error: BaseException) -> str:
    """The first line of what another program's error says: PyTorch's go on with frames of C++."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
